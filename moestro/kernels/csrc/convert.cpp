#include <cstring>

#include "half.hpp"
#include "kernels.hpp"
#include "pool.hpp"

namespace moestro {
namespace {

template <class T>
void transpose_items(const char* in, int64_t stride, int64_t step, int64_t rows, int64_t cols, T* out, int threads) {
    // Through a small square of our own: rows of the matrices often lie a power of two apart, which few cache lines can hold.
    constexpr int64_t SIDE = 64;
    parallel(threads, (cols + SIDE - 1) / SIDE, 1, [&](int64_t begin, int64_t end) {
        T square[SIDE * SIDE];
        for (int64_t block = begin; block < end; ++block) {
            const int64_t c0 = block * SIDE, width = std::min(SIDE, cols - c0);
            for (int64_t r0 = 0; r0 < rows; r0 += SIDE) {
                const int64_t height = std::min(SIDE, rows - r0);
                for (int64_t r = 0; r < height; ++r) {
                    const char* from = in + (r0 + r) * stride + c0 * step * static_cast<int64_t>(sizeof(T));
                    for (int64_t c = 0; c < width; ++c)
                        std::memcpy(&square[c * SIDE + r], from + c * step * static_cast<int64_t>(sizeof(T)), sizeof(T));
                }
                for (int64_t c = 0; c < width; ++c)
                    std::memcpy(out + (c0 + c) * rows + r0, &square[c * SIDE], static_cast<size_t>(height) * sizeof(T));
            }
        }
    });
}

}  // namespace

void to_f32(const uint16_t* values, float* out, int64_t count, bool half, int threads) {
    parallel(threads, count, 1 << 16, [&](int64_t begin, int64_t end) {
        // The source may lie at an odd address, hence memcpy.
        if (half) {
            for (int64_t i = begin; i < end; ++i) {
                uint16_t h;
                std::memcpy(&h, values + i, 2);
                out[i] = from_half(h);
            }
        } else {
            auto* bits = reinterpret_cast<uint32_t*>(out);
            for (int64_t i = begin; i < end; ++i) {
                uint16_t h;
                std::memcpy(&h, values + i, 2);
                bits[i] = static_cast<uint32_t>(h) << 16;
            }
        }
    });
}

void to_bf16(const float* values, uint16_t* out, int64_t count, int threads) {
    parallel(threads, count, 1 << 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) out[i] = to_bf16_bits(values[i]);
    });
}

void transpose(const void* in, int64_t stride, int64_t step, int64_t rows, int64_t cols, int item, void* out, int threads) {
    const auto* from = static_cast<const char*>(in);
    if (item == 1) transpose_items(from, stride, step, rows, cols, static_cast<uint8_t*>(out), threads);
    if (item == 2) transpose_items(from, stride, step, rows, cols, static_cast<uint16_t*>(out), threads);
    if (item == 4) transpose_items(from, stride, step, rows, cols, static_cast<uint32_t*>(out), threads);
}

}  // namespace moestro
