// Weights into packed tiles: from matrices in rows as they are, or encoded in 2 or 3 bits or nested planes as packed.py does in numpy.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "half.hpp"
#include "packed.hpp"
#include "pool.hpp"

namespace moestro {
namespace {

constexpr int MOST = 128;          // inputs of a group
constexpr int LANES = 8;           // running sums, so that loops vectorise
constexpr float ZERO_STEPS = 64;   // zeros of nested are whole numbers of 64ths

struct Group {  // of one row
    uint8_t codes[MOST];
    uint16_t scale = 0;
    uint8_t zero = 0;
    uint16_t minimum = 0;
    uint8_t signs[2][MOST];
    uint16_t sign_scales[2] = {};
};

// Lays one row's words of `bits` bits: word j holds inputs 4 j + per * ..., see packed.py.
void lay(const uint8_t* codes, int bits, int row, uint8_t* step) {
    uint32_t words[STEP / 4];
    std::memcpy(words, codes, STEP);
    const int per = 8 / bits;
    for (int w = 0; w < STEP / 4 / per; ++w) {
        uint32_t joined = 0;
        for (int i = 0; i < per; ++i) joined |= words[w * per + i] << (bits * i);
        std::memcpy(step + 4 * TILE * w + 4 * row, &joined, 4);
    }
}

void lay_step(Format format, const uint8_t* codes, int row, uint8_t* step) {
    switch (format) {
        case Format::tiles_int8: return lay(codes, 8, row, step);
        case Format::tiles_int4:
        case Format::tiles_uint4:
        case Format::tiles_mxfp4: return lay(codes, 4, row, step);
        case Format::tiles_sign: return lay(codes, 1, row, step);
        case Format::tiles_int3: {
            uint8_t low[STEP], high[STEP];
            for (int i = 0; i < STEP; ++i) low[i] = codes[i] & 3, high[i] = codes[i] >> 2;
            lay(low, 2, row, step);
            return lay(high, 1, row, step + 8 * TILE);
        }
        default: return lay(codes, 2, row, step);
    }
}

void lay_unit(Format format, int group, const uint8_t* codes, const void* scale, int row, uint8_t* unit) {
    const int bytes = format == Format::tiles_mxfp4 ? 1 : 2;
    std::memcpy(unit + bytes * row, scale, static_cast<size_t>(bytes));
    unit += head_bytes(format);
    for (int i = 0; i < group / STEP; ++i) lay_step(format, codes + i * STEP, row, unit + i * step_bytes(format));
}

// encode(row, group number, Group&) for all rows and groups; padding rows are zeros.
template <class Encode>
void fill(const MatrixRef& to, int threads, Encode&& encode) {
    const int64_t groups = to.cols / to.group, tiles = (to.rows + TILE - 1) / TILE;
    const int64_t bytes = tile_bytes(to.format, to.cols, to.group), sign_bytes = tile_bytes(Format::tiles_sign, to.cols, to.group);
    uint8_t* const parts[3] = {const_cast<uint8_t*>(to.data), const_cast<uint8_t*>(to.third), const_cast<uint8_t*>(to.fourth)};
    parallel(threads, tiles, std::max<int64_t>(1, (16 << 10) / std::max<int64_t>(1, to.cols * TILE)), [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            std::memset(parts[0] + tile * bytes, 0, static_cast<size_t>(bytes));
            for (int k = 1; k < 3; ++k)
                if (parts[k]) std::memset(parts[k] + tile * sign_bytes, 0, static_cast<size_t>(sign_bytes));
            const int rows = static_cast<int>(std::min<int64_t>(TILE, to.rows - tile * TILE));
            for (int64_t g = 0; g < groups; ++g) {
                uint8_t* unit = parts[0] + tile * bytes + g * (bytes / groups);
                for (int row = 0; row < rows; ++row) {
                    Group found;
                    encode(tile * TILE + row, g, found);
                    lay_unit(to.format, to.group, found.codes, &found.scale, row, unit);
                    if (to.format == Format::tiles_nested) unit[2 * TILE + row] = found.zero;
                    if (to.format == Format::tiles_uint4) std::memcpy(unit + 2 * (TILE + row), &found.minimum, 2);
                    for (int k = 1; k < 3; ++k)
                        if (parts[k])
                            lay_unit(Format::tiles_sign, to.group, found.signs[k - 1], &found.sign_scales[k - 1], row,
                                     parts[k] + tile * sign_bytes + g * (sign_bytes / groups));
                }
            }
        }
    });
}

float rounded(float value) { return (value + 12582912.0f) - 12582912.0f; }  // nearest, ties to even, for |value| < 2^22
float limited(float value, float low, float high) { return value < low ? low : value > high ? high : value; }

float total(const float* lanes) {
    float four[4];
    for (int i = 0; i < 4; ++i) four[i] = lanes[i] + lanes[i + 4];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// One size of a group's levels: fills codes and values, returns the squared error.
float try_scale(const float* w, int group, bool nested, float top, float low, float shrink, float s, float* z, uint8_t* codes, float* values) {
    const float by = s == 0 ? 1 : s;
    float lanes[LANES] = {};
    if (nested) {
        *z = rounded(limited(ZERO_STEPS * ((shrink * -low) / by), 0, 255));
        const float offset = *z / ZERO_STEPS, step = s / ZERO_STEPS;
        for (int i = 0; i < group; ++i) {
            const float u = rounded(limited(w[i] / by + offset, 0, top));
            codes[i] = static_cast<uint8_t>(static_cast<int>(u));
            values[i] = (ZERO_STEPS * u - *z) * step;
        }
    } else {
        for (int i = 0; i < group; ++i) {
            const float u = rounded(limited((w[i] / by + top) * 0.5f, 0, top));
            codes[i] = static_cast<uint8_t>(static_cast<int>(u));
            values[i] = (2 * u - top) * s;
        }
    }
    for (int i = 0; i < group; i += LANES)
        for (int j = 0; j < LANES; ++j) lanes[j] += (w[i + j] - values[i + j]) * (w[i + j] - values[i + j]);
    return total(lanes);
}

bool encode_group(const float* w, const MatrixRef& to, Group& out) {
    const int group = to.group;
    const bool nested = to.format == Format::tiles_nested;
    const float top = to.format == Format::tiles_int3 ? 7 : 3;
    float low = 0, high = 0;
    for (int i = 0; i < group; ++i) low = w[i] < low ? w[i] : low, high = w[i] > high ? w[i] : high;
    const float size = nested ? high - low : high > -low ? high : -low;
    if (!std::isfinite(from_half(to_half(size / top)))) return false;
    float least = INFINITY, values[2][MOST];
    uint8_t codes[2][MOST];
    int best = 0;
    for (int i = 0; i <= 10; ++i) {
        const float shrink = 1.0f - static_cast<float>(i) / 16.0f;
        const uint16_t half = to_half(shrink * size / top);
        float z = 0;
        const int now = 1 - best;
        const float error = try_scale(w, group, nested, top, low, shrink, from_half(half), &z, codes[now], values[now]);
        if (error < least) {
            least = error;
            best = now;
            out.scale = half;
            out.zero = static_cast<uint8_t>(static_cast<int>(z));
        }
    }
    if (!(least < INFINITY)) return false;
    std::memcpy(out.codes, codes[best], static_cast<size_t>(group));
    float* found = values[best];
    for (int k = 0; k < 2; ++k) {
        if (!(k == 0 ? to.third : to.fourth)) break;
        float lanes[LANES] = {};
        for (int i = 0; i < group; i += LANES)
            for (int j = 0; j < LANES; ++j) lanes[j] += std::fabs(w[i + j] - found[i + j]);
        out.sign_scales[k] = to_half(total(lanes) / static_cast<float>(group));
        const float s = from_half(out.sign_scales[k]);
        if (!std::isfinite(s)) return false;
        for (int i = 0; i < group; ++i) {
            out.signs[k][i] = w[i] - found[i] >= 0;
            found[i] += out.signs[k][i] ? s : -s;
        }
    }
    return true;
}

}  // namespace

void pack_tiles(const MatrixRef& to, const uint8_t* codes, const uint8_t* scales, int threads) {
    const int64_t groups = to.cols / to.group;
    const bool bytes = to.format == Format::tiles_int8;
    const bool minimums = to.format == Format::tiles_uint4;
    const int scale_bytes = to.format == Format::tiles_mxfp4 ? 1 : 2, stride = minimums ? 4 : scale_bytes;
    fill(to, threads, [&](int64_t row, int64_t g, Group& out) {
        const int64_t at = row * to.cols + g * to.group;
        if (bytes)
            std::memcpy(out.codes, codes + at, static_cast<size_t>(to.group));
        else
            for (int i = 0; i < to.group / 2; ++i) {
                const uint8_t both = codes[at / 2 + i];
                out.codes[2 * i] = both & 15;
                out.codes[2 * i + 1] = both >> 4;
            }
        const uint8_t* scale = scales + (row * groups + g) * stride;
        std::memcpy(&out.scale, scale, static_cast<size_t>(scale_bytes));
        if (minimums) std::memcpy(&out.minimum, scale + 2, 2);
    });
}

bool quantise_tiles(const MatrixRef& to, const float* w, int threads) {
    std::atomic<bool> good{true};
    fill(to, threads, [&](int64_t row, int64_t g, Group& out) {
        if (!encode_group(w + row * to.cols + g * to.group, to, out)) good.store(false, std::memory_order_relaxed);
    });
    return good.load();
}

}  // namespace moestro
