// Weights to int8, int4, MXFP4 and uint4; the same bytes as the numpy reference.
#include <atomic>
#include <cmath>

#include "half.hpp"
#include "kernels.hpp"
#include "pool.hpp"

namespace moestro {
namespace {

constexpr int MOST = 128;  // inputs of a group
constexpr int LANES = 8;  // running extremes side by side, so that loops vectorise

float largest(const float* w, int group) {  // the first element of largest magnitude, with its sign
    float sizes[LANES] = {};
    for (int i = 0; i < group; i += LANES)
        for (int j = 0; j < LANES; ++j) {
            const float size = std::fabs(w[i + j]);
            sizes[j] = size > sizes[j] ? size : sizes[j];
        }
    float size = 0;
    for (int j = 0; j < LANES; ++j) size = sizes[j] > size ? sizes[j] : size;
    int i = 0;
    while (std::fabs(w[i]) != size) ++i;
    return w[i];
}

float highest(const float* w, int group, float sign) {  // of sign * w
    float tops[LANES];
    for (int j = 0; j < LANES; ++j) tops[j] = -INFINITY;
    for (int i = 0; i < group; i += LANES)
        for (int j = 0; j < LANES; ++j) {
            const float value = sign * w[i + j];
            tops[j] = value > tops[j] ? value : tops[j];
        }
    float top = tops[0];
    for (int j = 1; j < LANES; ++j) top = tops[j] > top ? tops[j] : top;
    return top;
}

// In two steps: a nested choice would keep loops from being vectorised.
float limited(float value, float low, float high) {
    const float above = value < low ? low : value;
    return above > high ? high : above;
}

// Nearest whole number, ties to even, for |value| < 2^22, without a call, so that loops vectorise.
float rounded(float value) { return (value + 12582912.0f) - 12582912.0f; }

// The nearest codes (w - zero) / scale within low and high; zeros where the scale is 0.
void codes_of(const float* w, int group, float scale, float zero, float low, float high, int* codes) {
    const float by = scale == 0 ? INFINITY : scale;
    for (int i = 0; i < group; ++i) codes[i] = static_cast<int>(rounded(limited((w[i] - zero) / by, low, high)));
}

uint8_t e2m1(float value) {
    const float size = std::fabs(value);
    const int code = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) + (size > 2.5f) + (size >= 3.5f) + (size > 5.0f);
    return static_cast<uint8_t>(code | (std::signbit(value) ? 8 : 0));
}

// False when a scale is not finite.
bool scaled_group(const float* w, int kind, int group, uint8_t* data, void* scales, int64_t index, bool half) {
    float scale = kind == 0 ? std::fabs(largest(w, group)) / 127.0f : largest(w, group) / -8.0f;
    if (half) {
        const uint16_t bits = to_half(scale);
        static_cast<uint16_t*>(scales)[index] = bits;
        scale = from_half(bits);
        if (!std::isfinite(scale)) return false;
    } else {
        static_cast<float*>(scales)[index] = scale;
    }
    int whole[MOST];
    codes_of(w, group, scale, 0, kind == 0 ? -127 : -8, kind == 0 ? 127 : 7, whole);
    if (kind == 0)
        for (int i = 0; i < group; ++i) data[i] = static_cast<uint8_t>(whole[i]);
    else
        for (int i = 0; i < group / 2; ++i) data[i] = static_cast<uint8_t>((whole[2 * i] + 8) | (whole[2 * i + 1] + 8) << 4);
    return true;
}

// Pairs of a scale and a minimum; false when one is not finite.
bool uint4_group(const float* w, int group, uint8_t* data, uint16_t* pair) {
    const float high = highest(w, group, 1.0f), low = -highest(w, group, -1.0f);
    pair[0] = to_half((high - low) / 15.0f);
    pair[1] = to_half(low + 0.0f);  // no negative zero
    const float scale = from_half(pair[0]), minimum = from_half(pair[1]);
    if (!std::isfinite(scale) || !std::isfinite(minimum)) return false;
    int whole[MOST];
    codes_of(w, group, scale, minimum, 0, 15, whole);
    for (int i = 0; i < group / 2; ++i) data[i] = static_cast<uint8_t>(whole[2 * i] | whole[2 * i + 1] << 4);
    return true;
}

void mxfp4_group(const float* w, int group, uint8_t* data, uint8_t* scale) {
    const float top = largest(w, group);
    int exponent = 0;
    if (top != 0) {
        std::frexp(top, &exponent);  // top = m * 2^exponent with m in [0.5, 1)
        exponent = static_cast<int>(limited(static_cast<float>(exponent - 3), -127, 127)) + 127;
    }
    *scale = static_cast<uint8_t>(exponent);
    const float by = std::ldexp(1.0f, 127 - exponent);  // a power of two, so products are exact or rounded as ldexp would
    uint8_t codes[MOST];
    for (int i = 0; i < group; ++i) codes[i] = e2m1(w[i] * by);
    for (int i = 0; i < group; i += 2) data[i / 2] = static_cast<uint8_t>(codes[i] | codes[i + 1] << 4);
}

}  // namespace

bool quantise(const float* w, int64_t rows, int64_t cols, int kind, int group, void* data, void* scales, bool half_scales,
              int threads) {
    std::atomic<bool> good{true};
    const int64_t groups = cols / group, bytes = kind == 0 ? group : group / 2;
    parallel(threads, rows, std::max<int64_t>(1, (16 << 10) / std::max<int64_t>(1, cols)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * groups; i < end * groups; ++i) {
            auto* to = static_cast<uint8_t*>(data) + i * bytes;
            bool fine = true;
            if (kind == 3)
                fine = uint4_group(w + i * group, group, to, static_cast<uint16_t*>(scales) + 2 * i);
            else if (kind == 2)
                mxfp4_group(w + i * group, group, to, static_cast<uint8_t*>(scales) + i);
            else
                fine = scaled_group(w + i * group, kind, group, to, scales, i, half_scales);
            if (!fine) good.store(false, std::memory_order_relaxed);
        }
    });
    return good.load();
}

}  // namespace moestro
