// Weights into packed tiles: from rows of codes as they are, or encoded by the level in force.
#include <atomic>
#include <cstring>

#include "lay_tile.hpp"
#include "level.hpp"
#include "packed.hpp"
#include "pool.hpp"

namespace moestro {
namespace {

int64_t some_tiles(int64_t cols) { return std::max<int64_t>(1, (16 << 10) / std::max<int64_t>(1, cols * TILE)); }

template <Format F>
void lay_rows(const MatrixRef& to, const uint8_t* codes, const uint8_t* scales, int64_t begin, int64_t end) {
    constexpr int scale_bytes = F == Format::tiles_mxfp4 ? 1 : 2, stride = F == Format::tiles_uint4 ? 4 : scale_bytes;
    const int64_t groups = to.cols / to.group, bytes = tile_bytes(F, to.cols, to.group);
    auto* const out = const_cast<uint8_t*>(to.data);
    std::memset(out + begin * bytes, 0, static_cast<size_t>((end - begin) * bytes));
    for (int64_t row = begin * TILE; row < std::min(end * TILE, to.rows); ++row)
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t at = row * to.cols + g * to.group;
            uint8_t own[MOST];
            if constexpr (F == Format::tiles_int8)
                std::memcpy(own, codes + at, static_cast<size_t>(to.group));
            else
                for (int i = 0; i < to.group / 2; ++i) {
                    const uint8_t both = codes[at / 2 + i];
                    own[2 * i] = both & 15;
                    own[2 * i + 1] = both >> 4;
                }
            const uint8_t* scale = scales + (row * groups + g) * stride;
            const int lane = static_cast<int>(row % TILE);
            uint8_t* unit = out + row / TILE * bytes + g * (bytes / groups);
            lay_unit<F>(to.group, own, scale, lane, unit);
            if constexpr (F == Format::tiles_uint4) std::memcpy(unit + 2 * (TILE + lane), scale + 2, 2);
        }
}

}  // namespace

void pack_tiles(const MatrixRef& to, const uint8_t* codes, const uint8_t* scales, int threads) {
    parallel(threads, (to.rows + TILE - 1) / TILE, some_tiles(to.cols), [&](int64_t begin, int64_t end) {
        switch (to.format) {
            case Format::tiles_int8: return lay_rows<Format::tiles_int8>(to, codes, scales, begin, end);
            case Format::tiles_int4: return lay_rows<Format::tiles_int4>(to, codes, scales, begin, end);
            case Format::tiles_uint4: return lay_rows<Format::tiles_uint4>(to, codes, scales, begin, end);
            default: return lay_rows<Format::tiles_mxfp4>(to, codes, scales, begin, end);
        }
    });
}

Fit quantise_tiles(const MatrixRef& to, const MatrixRef& from, int threads) {
    std::atomic<int> worst{0};
    parallel(threads, (to.rows + TILE - 1) / TILE, some_tiles(to.cols), [&](int64_t begin, int64_t end) {
        const int found = static_cast<int>(current().packed->encode(to, from, begin, end));
        int seen = worst.load(std::memory_order_relaxed);
        while (seen < found && !worst.compare_exchange_weak(seen, found, std::memory_order_relaxed)) {
        }
    });
    return static_cast<Fit>(worst.load());
}

}  // namespace moestro
