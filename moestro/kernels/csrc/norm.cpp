// Row-wise kernels of the decoder: they touch kilobytes, so plain loops that any compiler vectorises are enough.
#include <cmath>

#include "trunk.hpp"

namespace moestro {
namespace {

float sum_of_squares(const float* x, int64_t width) {
    float sums[16] = {};
    int64_t d = 0;
    for (; d + 16 <= width; d += 16)
        for (int j = 0; j < 16; ++j) sums[j] += x[d + j] * x[d + j];
    for (int j = 0; d < width; ++d, ++j) sums[j] += x[d] * x[d];
    for (int half = 8; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
    return sums[0];
}

}  // namespace

void rms_norm(Rows3 x, const Rows3* y, float scale, const float* weight, float eps, float shift, Rows3 out, int64_t tokens,
              int64_t heads, int64_t width) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h) {
            float* row = x.at(t, h);
            if (y) {
                const float* more = y->at(t, h);
                for (int64_t d = 0; d < width; ++d) row[d] += scale * more[d];
            }
            const float by = 1.0f / std::sqrt(sum_of_squares(row, width) / static_cast<float>(width) + eps);
            float* to = out.at(t, h);
            for (int64_t d = 0; d < width; ++d) to[d] = row[d] * by * (weight[d] + shift);
        }
}

void rotate(Rows3 x, const char* cos, int64_t cos_stride, const char* sin, int64_t sin_stride, int64_t tokens, int64_t heads,
            int64_t half, bool interleaved) {
    for (int64_t t = 0; t < tokens; ++t) {
        const auto* c = reinterpret_cast<const float*>(cos + t * cos_stride);
        const auto* s = reinterpret_cast<const float*>(sin + t * sin_stride);
        for (int64_t h = 0; h < heads; ++h) {
            float* row = x.at(t, h);
            if (interleaved) {
                for (int64_t i = 0; i < half; ++i) {
                    const float a = row[2 * i], b = row[2 * i + 1];
                    row[2 * i] = a * c[i] - b * s[i];
                    row[2 * i + 1] = b * c[i] + a * s[i];
                }
            } else {
                float* other = row + half;
                for (int64_t i = 0; i < half; ++i) {
                    const float a = row[i], b = other[i];
                    row[i] = a * c[i] - b * s[i];
                    other[i] = b * c[i] + a * s[i];
                }
            }
        }
    }
}

void softmax(const char* x, int64_t stride, float* out, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
        const auto* row = reinterpret_cast<const float*>(x + r * stride);
        float* to = out + r * width;
        float top = -INFINITY, sum = 0;
        for (int64_t i = 0; i < width; ++i) top = row[i] > top ? row[i] : top;
        for (int64_t i = 0; i < width; ++i) sum += to[i] = std::exp(row[i] - top);
        for (int64_t i = 0; i < width; ++i) to[i] /= sum;
    }
}

void sigmoid(const char* x, int64_t stride, float* out, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
        const auto* row = reinterpret_cast<const float*>(x + r * stride);
        for (int64_t i = 0; i < width; ++i) {
            const float decay = std::exp(-std::fabs(row[i]));
            out[r * width + i] = (row[i] >= 0 ? 1.0f : decay) / (1.0f + decay);
        }
    }
}

}  // namespace moestro
