// Before a level's packed kernels are used they must give the scalar level's bits: most levels have run on few machines.
#include <cstring>
#include <vector>

#include "packed.hpp"

namespace moestro {
namespace {

struct Draw {  // a small linear congruential generator
    uint32_t state = 1;
    uint32_t operator()() { return state = state * 1664525u + 1013904223u, state >> 8; }
};

std::vector<uint8_t> random_tiles(Format format, int64_t tiles, int64_t cols, int group, Draw& draw) {
    const int64_t bytes = tile_bytes(format, cols, group), unit = bytes / (cols / group);
    std::vector<uint8_t> out(static_cast<size_t>(tiles * bytes + AHEAD));
    for (auto& byte : out) byte = static_cast<uint8_t>(draw());
    for (int64_t u = 0; u < tiles * bytes; u += unit)
        for (int i = 0; i < TILE; ++i) {
            if (format == Format::tiles_mxfp4) {
                out[u + i] = static_cast<uint8_t>(120 + draw() % 8);
            } else {  // positive halves of about one
                out[u + 2 * i + 1] = static_cast<uint8_t>(0x38 + draw() % 4);
                if (format == Format::tiles_uint4) out[u + 2 * (TILE + i) + 1] = static_cast<uint8_t>(0x38 + draw() % 4);
            }
        }
    if (format == Format::tiles_int8)  // no code is -128
        for (int64_t u = 0; u < tiles * bytes; u += unit)
            for (int64_t i = 2 * TILE; i < unit; ++i) out[u + i] = out[u + i] == 128 ? 0 : out[u + i];
    return out;
}

// x: TILE rows of 192 numbers.
bool encodes_like_scalar(const PackedLevel& level, Format format, int group, const float* x) {
    constexpr int64_t cols = 192;
    std::vector<uint8_t> parts[2][3];
    for (int k = 0; k < 2; ++k) {
        for (int i = 0; i < 3; ++i) parts[k][i].resize(static_cast<size_t>(tile_bytes(i ? Format::tiles_sign : format, cols, group)));
        const bool nested = format == Format::tiles_nested;
        const MatrixRef to{format, parts[k][0].data(), 0, TILE, cols, nullptr, 0, true, group, nested ? parts[k][1].data() : nullptr,
                           nested ? parts[k][2].data() : nullptr};
        const MatrixRef from{Format::f32, reinterpret_cast<const uint8_t*>(x), cols * 4, TILE, cols, nullptr, 0, false, 0};
        if ((k ? level : *packed_scalar()).encode(to, from, 0, 1) != Fit::good) return false;
    }
    return parts[0][0] == parts[1][0] && parts[0][1] == parts[1][1] && parts[0][2] == parts[1][2];
}

}  // namespace

bool agrees_with_scalar(const PackedLevel& level) {
    constexpr int64_t cols = 192, blocks = cols / STEP;
    constexpr int rows = 19, tiles = 3, most = rows * blocks;
    constexpr struct {
        int rows, tiles;
    } calls[] = {{1, tiles}, {3, 1}, {11, 1}, {rows, 2}};  // alone and in pairs, few and many
    const PackedLevel& scalar = *packed_scalar();
    Draw draw;
    float x[rows * cols];
    for (auto& value : x) value = static_cast<float>(static_cast<int32_t>(draw() % 20001) - 10000) / 3000.0f;
    int8_t codes[2][most * STEP];
    float scales[2][most];
    int32_t sums[2][most];
    for (int k = 0; k < 2; ++k)
        for (int r = 0; r < rows; ++r) (k ? level : scalar).round(x + r * cols, blocks, codes[k] + r * STEP, scales[k] + r, sums[k] + r, rows);
    if (std::memcmp(codes[0], codes[1], sizeof codes[0]) || std::memcmp(scales[0], scales[1], sizeof scales[0]) ||
        std::memcmp(sums[0], sums[1], sizeof sums[0]))
        return false;
    for (Format format : {Format::tiles_int8, Format::tiles_int4, Format::tiles_int3, Format::tiles_int2, Format::tiles_mxfp4, Format::tiles_nested,
                          Format::tiles_uint4}) {
        const int group = format == Format::tiles_mxfp4 ? 32 : 64;
        if (!encodes_like_scalar(level, format, group, x)) return false;
        const auto base = random_tiles(format, tiles, cols, group, draw), third = random_tiles(Format::tiles_sign, tiles, cols, group, draw),
                   fourth = random_tiles(Format::tiles_sign, tiles, cols, group, draw);
        for (int planes = 0; planes < (format == Format::tiles_nested ? 3 : 1); ++planes) {
            const MatrixRef w{format, base.data(), 0,     TILE * tiles, cols, nullptr, 0, true,
                              group,  planes > 0 ? third.data() : nullptr, planes > 1 ? fourth.data() : nullptr};
            for (auto [some, count] : calls) {
                float found[2][tiles * rows * TILE];
                for (int k = 0; k < 2; ++k) (k ? level : scalar).product(w, 0, count, {codes[0], scales[0], sums[0], some}, found[k]);
                if (std::memcmp(found[0], found[1], sizeof(float) * count * some * TILE)) return false;
            }
        }
    }
    return true;
}

}  // namespace moestro
