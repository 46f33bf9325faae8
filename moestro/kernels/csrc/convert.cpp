#include <cstring>

#include "half.hpp"
#include "kernels.hpp"
#include "pool.hpp"

namespace moestro {
namespace {

template <class T>
void transpose_items(const char* in, int64_t stride, int64_t step, int64_t rows, int64_t cols, T* out, int threads) {
    constexpr int64_t SIDE = 64;  // a square of this side of both matrices stays in the first cache
    parallel(threads, (cols + SIDE - 1) / SIDE, 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t c0 = block * SIDE, c1 = std::min(c0 + SIDE, cols);
            for (int64_t r0 = 0; r0 < rows; r0 += SIDE) {
                const int64_t r1 = std::min(r0 + SIDE, rows);
                for (int64_t c = c0; c < c1; ++c)
                    for (int64_t r = r0; r < r1; ++r)
                        std::memcpy(out + c * rows + r, in + r * stride + c * step * static_cast<int64_t>(sizeof(T)), sizeof(T));
            }
        }
    });
}

}  // namespace

void to_f32(const uint16_t* values, float* out, int64_t count, bool half, int threads) {
    parallel(threads, count, 1 << 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            uint16_t h;
            std::memcpy(&h, values + i, 2);  // the source may lie at an odd address
            if (half) {
                out[i] = from_half(h);
            } else {
                const uint32_t bits = static_cast<uint32_t>(h) << 16;
                std::memcpy(out + i, &bits, 4);
            }
        }
    });
}

void to_bf16(const float* values, uint16_t* out, int64_t count, int threads) {
    parallel(threads, count, 1 << 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            uint32_t bits;
            std::memcpy(&bits, values + i, 4);
            const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
            const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
            out[i] = static_cast<uint16_t>(nan ? (bits >> 16 | 0x40u) : rounded);
        }
    });
}

void transpose(const void* in, int64_t stride, int64_t step, int64_t rows, int64_t cols, int item, void* out, int threads) {
    const auto* from = static_cast<const char*>(in);
    if (item == 1) transpose_items(from, stride, step, rows, cols, static_cast<uint8_t*>(out), threads);
    if (item == 2) transpose_items(from, stride, step, rows, cols, static_cast<uint16_t*>(out), threads);
    if (item == 4) transpose_items(from, stride, step, rows, cols, static_cast<uint32_t*>(out), threads);
}

}  // namespace moestro
