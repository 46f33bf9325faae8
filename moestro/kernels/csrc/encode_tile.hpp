// Weights of any float format into packed tiles, in one pass: packed.py has the rules and the layout. Included once for each instruction
// set, so everything here is static; every step rounds on its own, so all of them give the same bytes.
#pragma once
#include <cmath>

#include "half.hpp"
#include "lay_tile.hpp"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace moestro {
namespace {

// Eight values side by side, by the compiler's own vectors: it leaves too many loops over arrays as they are. Every operation rounds as
// it would alone, whatever registers there are.
constexpr int SIDE = 8;
using Eight = float __attribute__((vector_size(4 * SIDE)));
using EightInts = int32_t __attribute__((vector_size(4 * SIDE)));
using EightBits = uint32_t __attribute__((vector_size(4 * SIDE)));
using EightHalves = uint16_t __attribute__((vector_size(2 * SIDE)));
using EightBytes = uint8_t __attribute__((vector_size(SIDE)));
using Four = float __attribute__((vector_size(16)));

constexpr float ZERO_STEPS = 64;  // zeros of nested are whole numbers of 64ths
constexpr int SHRINKS = 11;       // tried sizes of a group's range

constexpr int RUN = 8;            // groups of a row taken together, for each alone is one long chain of steps

struct Run {  // of one row
    uint8_t codes[RUN][MOST];
    uint16_t scale[RUN], minimum[RUN];
    uint8_t zero[RUN];
    uint8_t signs[2][RUN][MOST];
    uint16_t sign_scale[2][RUN];
};

struct Extremes {
    float high, low;
};

template <class T>
inline T load(const void* from) {
    T out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
inline Eight limited(const Eight& value, float low, float high) {
    const Eight above = value < low ? Eight{} + low : value;
    return above > high ? Eight{} + high : above;
}
constexpr float MAGIC = 12582912.0f;  // added to a number below 2^22 leaves its nearest whole number in the lowest bits, ties to even
inline Eight rounded(const Eight& value) { return (value + MAGIC) - MAGIC; }
inline EightBits bits_of(const Eight& value) { return load<EightBits>(&value); }
inline void put_lowest(const EightBits& bits, uint8_t* bytes) {  // the lowest byte of each
#if defined(__AVX2__)
    const __m256i picked = _mm256_shuffle_epi8(load<__m256i>(&bits), _mm256_set1_epi32(0x0c080400));
    const uint64_t low = static_cast<uint32_t>(_mm256_cvtsi256_si32(picked));
    const uint64_t all = low | static_cast<uint64_t>(static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_extracti128_si256(picked, 1)))) << 32;
    std::memcpy(bytes, &all, sizeof all);
#else
    const EightBytes all = __builtin_convertvector(bits & 255u, EightBytes);
    std::memcpy(bytes, &all, sizeof all);
#endif
}

inline Extremes extremes(const float* w, int group) {
    Eight highs = load<Eight>(w), lows = highs;
    for (int i = SIDE; i < group; i += SIDE) {
        const Eight some = load<Eight>(w + i);
        highs = some > highs ? some : highs;
        lows = some < lows ? some : lows;
    }
    float ends[2 * SIDE];
    std::memcpy(ends, &highs, sizeof highs);
    std::memcpy(ends + SIDE, &lows, sizeof lows);
    const Four other_highs = load<Four>(ends + 4), other_lows = load<Four>(ends + 12);
    Four high = load<Four>(ends), low = load<Four>(ends + 8);
    high = other_highs > high ? other_highs : high;
    low = other_lows < low ? other_lows : low;
    Extremes out{high[0], low[0]};
    for (int j = 1; j < 4; ++j) {
        out.high = high[j] > out.high ? high[j] : out.high;
        out.low = low[j] < out.low ? low[j] : out.low;
    }
    return out;
}

inline float total(const Eight& lanes) {
    float each[SIDE], four[4];
    std::memcpy(each, &lanes, sizeof each);
    for (int i = 0; i < 4; ++i) four[i] = each[i] + each[i + 4];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// The nearest codes (w - offset) / scale within low and high, plus `more`; `more` where the scale is 0.
inline void codes_of(const float* w, int group, float scale, float offset, float low, float high, uint32_t more, uint8_t* codes) {
    const float by = scale == 0 ? INFINITY : scale;
    for (int i = 0; i < group; i += SIDE) 
        put_lowest(bits_of(limited((load<Eight>(w + i) - offset) / by, low, high) + MAGIC) + more, codes + i);
}

inline bool usable(uint16_t half) { return (half & 0x7c00u) != 0x7c00u; }

// The levels of a group in 2 or 3 bits, or of the base of nested, for one size of its range.
template <bool NESTED>
struct Levels {
    float top, s, z;  // z: in 64ths
    Levels(float top, float s, float shrink, float low)
        : top(top), s(s), z(NESTED ? rounded(limited(Eight{} + ZERO_STEPS * ((shrink * -low) / by()), 0, 255))[0] : 0) {}
    float by() const { return s == 0 ? 1 : s; }
    Eight codes(const Eight& w) const {
        if constexpr (NESTED) return rounded(limited(w / by() + z / ZERO_STEPS, 0, top));
        return rounded(limited((w / by() + top) * 0.5f, 0, top));
    }
    Eight values(const Eight& u) const {
        if constexpr (NESTED) return (ZERO_STEPS * u - z) * (s / ZERO_STEPS);
        return (2 * u - top) * s;
    }
};

// The best of the shrunken ranges, and of nested its further planes.
template <bool NESTED>
bool search(const float* w, const MatrixRef& to, float top, const Extremes& seen, int g, Run& out) {
    const float low = seen.low < 0 ? seen.low : 0, high = seen.high > 0 ? seen.high : 0;
    const float size = NESTED ? high - low : high > -low ? high : -low;
    if (!usable(to_half(size / top))) return false;
    Levels<NESTED> best(top, 0, 1, low);
    float least = INFINITY;
    for (int i = 0; i < SHRINKS; ++i) {
        const float shrink = 1.0f - static_cast<float>(i) / 16.0f;
        const uint16_t half = to_half(shrink * size / top);
        const Levels<NESTED> tried(top, from_half(half), shrink, low);
        Eight lanes{};
        for (int j = 0; j < to.group; j += SIDE) {
            const Eight some = load<Eight>(w + j), away = some - tried.values(tried.codes(some));
            lanes += away * away;
        }
        if (const float error = total(lanes); error < least) {
            least = error;
            out.scale[g] = half;
            best = tried;
        }
    }
    if (!(least < INFINITY)) return false;
    out.zero[g] = static_cast<uint8_t>(static_cast<int>(best.z));
    float rest[MOST];
    for (int i = 0; i < to.group; i += SIDE) {
        const Eight some = load<Eight>(w + i), whole = best.codes(some), found = best.values(whole);
        put_lowest(bits_of(whole + MAGIC), out.codes[g] + i);
        std::memcpy(rest + i, &found, sizeof found);
    }
    for (int k = 0; k < 2; ++k) {
        if (!(k == 0 ? to.third : to.fourth)) break;
        Eight lanes{};
        for (int i = 0; i < to.group; i += SIDE) {
            const Eight away = load<Eight>(w + i) - load<Eight>(rest + i);
            lanes += away < 0 ? -away : away;
        }
        out.sign_scale[k][g] = to_half(total(lanes) / static_cast<float>(to.group));
        if (!usable(out.sign_scale[k][g])) return false;
        const float plane = from_half(out.sign_scale[k][g]);
        for (int i = 0; i < to.group; ++i) {
            out.signs[k][g][i] = w[i] - rest[i] >= 0;
            rest[i] += out.signs[k][g][i] ? plane : -plane;
        }
    }
    return true;
}

inline void e2m1(const float* w, int group, float by, uint8_t* codes) {
    for (int i = 0; i < group; i += SIDE) {
        const Eight value = load<Eight>(w + i) * by;
        const EightBits bits = bits_of(value), unsigned_bits = bits & 0x7fffffffu;
        const Eight size = load<Eight>(&unsigned_bits);
        const EightInts below = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) + (size > 2.5f) + (size >= 3.5f) + (size > 5.0f);
        put_lowest(load<EightBits>(&below) * -1 | (bits >> 28 & 8u), codes + i);
    }
}

// Some groups of a row; false when a scale or minimum does not fit float16.
template <Format F>
inline bool encode_run(const float* w, int groups, const MatrixRef& to, Run& out) {
    const int group = to.group;
    Extremes seen[RUN];
    bool fits = true;
    for (int g = 0; g < groups; ++g) seen[g] = extremes(w + g * group, group);
    for (int g = 0; g < groups; ++g) {
        const float high = seen[g].high, low = seen[g].low, size = high > -low ? high : -low;
        if constexpr (F == Format::tiles_int8) {
            out.scale[g] = to_half(std::fabs(size) / 127.0f);
        } else if constexpr (F == Format::tiles_int4) {
            float top = size > high ? low : high;
            if (high == -low) {  // the first of those of largest magnitude
                int i = 0;
                while (i < group - 1 && std::fabs(w[g * group + i]) != std::fabs(size)) ++i;
                top = w[g * group + i];
            }
            out.scale[g] = to_half(top / -8.0f);
        } else if constexpr (F == Format::tiles_uint4) {
            out.scale[g] = to_half((high - low) / 15.0f);
            out.minimum[g] = to_half(low + 0.0f);  // no negative zero
            fits = fits && usable(out.minimum[g]);
        } else if constexpr (F == Format::tiles_mxfp4) {
            int exponent = 0;
            if (size != 0) {
                std::frexp(size, &exponent);  // size = m * 2^exponent with m in [0.5, 1)
                exponent = (exponent < -124 ? -127 : exponent - 3) + 127;
            }
            out.scale[g] = static_cast<uint16_t>(exponent);
        } else {
            fits = search<F == Format::tiles_nested>(w + g * group, to, F == Format::tiles_int3 ? 7.0f : 3.0f, seen[g], g, out) && fits;
        }
        fits = fits && usable(out.scale[g]);
    }
    if (!fits) return false;
    for (int g = 0; g < groups; ++g) {
        const float* from = w + g * group;
        const float scale = from_half(out.scale[g]);
        if constexpr (F == Format::tiles_int8) codes_of(from, group, scale, 0, -127, 127, 0, out.codes[g]);
        if constexpr (F == Format::tiles_int4) codes_of(from, group, scale, 0, -8, 7, 8, out.codes[g]);
        if constexpr (F == Format::tiles_uint4) codes_of(from, group, scale, from_half(out.minimum[g]), 0, 15, 0, out.codes[g]);
        if constexpr (F == Format::tiles_mxfp4)  // by a power of two: products are exact, or rounded as ldexp would
            e2m1(from, group, std::ldexp(1.0f, 127 - out.scale[g]), out.codes[g]);
    }
    return true;
}

// Numbers at any address in float32. Whether they are finite is added to `bad`, whose lanes are not 0 where one was not.
template <Format FROM>
inline void floats_of(const uint8_t* from, int count, float* out, EightBits& bad) {
    for (int i = 0; i < count; i += SIDE) {
        EightBits bits;
        if constexpr (FROM == Format::f32) {
            bits = load<EightBits>(from + 4 * i);
        } else if constexpr (FROM == Format::bf16) {
            bits = __builtin_convertvector(load<EightHalves>(from + 2 * i), EightBits) << 16;
        } else {  // as from_half
            const EightBits half = __builtin_convertvector(load<EightHalves>(from + 2 * i), EightBits), rest = half & 0x7fffu;
            const EightBits shifted = (rest << 13) + 0x38800000u, large = load<EightBits>(&rest) >= 0x7c00u;
            const EightBits normal = (rest << 13) + 0x38000000u + (large & 0x38000000u), small = rest < 0x400u;
            const Eight tiny = load<Eight>(&shifted) - 0x1p-14f;
            bits = (half & 0x8000u) << 16 | (small & bits_of(tiny)) | (~small & normal);
        }
        const EightBits wrong = (bits & 0x7f800000u) == 0x7f800000u;
        bad |= wrong;
        std::memcpy(out + i, &bits, sizeof bits);
    }
}

// Tiles begin..end of a matrix of rows `from`; padding rows are zeros.
template <Format F, Format FROM>
Fit encode_from(const MatrixRef& to, const MatrixRef& from, int64_t begin, int64_t end) {
    const int64_t all = to.cols / to.group, bytes = tile_bytes(F, to.cols, to.group), sign_bytes = tile_bytes(Format::tiles_sign, to.cols, to.group);
    const int64_t unit_bytes = bytes / all, sign_unit_bytes = sign_bytes / all, wide = FROM == Format::f32 ? 4 : 2;
    uint8_t* const parts[3] = {const_cast<uint8_t*>(to.data), const_cast<uint8_t*>(to.third), const_cast<uint8_t*>(to.fourth)};
    bool fits = true;
    float w[RUN * MOST];
    Run found;
    for (int64_t tile = begin; tile < end; ++tile) {
        const int rows = static_cast<int>(to.rows - tile * TILE < TILE ? to.rows - tile * TILE : TILE);
        if (rows < TILE) {
            std::memset(parts[0] + tile * bytes, 0, static_cast<size_t>(bytes));
            for (int k = 1; k < 3; ++k)
                if (parts[k]) std::memset(parts[k] + tile * sign_bytes, 0, static_cast<size_t>(sign_bytes));
        }
        EightBits bad{};
        for (int64_t first = 0; first < all; first += RUN) {
            const int groups = static_cast<int>(all - first < RUN ? all - first : RUN);
            for (int row = 0; row < rows; ++row) {
                floats_of<FROM>(from.data + (tile * TILE + row) * from.stride + first * to.group * wide, groups * to.group, w, bad);
                if (!(fits = fits && encode_run<F>(w, groups, to, found))) continue;
                for (int g = 0; g < groups; ++g) {
                    uint8_t* unit = parts[0] + tile * bytes + (first + g) * unit_bytes;
                    lay_unit<F>(to.group, found.codes[g], &found.scale[g], row, unit);
                    if constexpr (F == Format::tiles_nested) unit[2 * TILE + row] = found.zero[g];
                    if constexpr (F == Format::tiles_uint4) std::memcpy(unit + 2 * (TILE + row), &found.minimum[g], 2);
                    if constexpr (F == Format::tiles_nested)
                        for (int k = 1; k < 3; ++k)
                            if (parts[k])
                                lay_unit<Format::tiles_sign>(to.group, found.signs[k - 1][g], &found.sign_scale[k - 1][g], row,
                                                             parts[k] + tile * sign_bytes + (first + g) * sign_unit_bytes);
                }
            }
        }
        for (int j = 0; j < SIDE; ++j)
            if (bad[j]) return Fit::not_finite;
    }
    return fits ? Fit::good : Fit::too_large;
}

template <Format F>
Fit encode_format(const MatrixRef& to, const MatrixRef& from, int64_t begin, int64_t end) {
    switch (from.format) {
        case Format::bf16: return encode_from<F, Format::bf16>(to, from, begin, end);
        case Format::f16: return encode_from<F, Format::f16>(to, from, begin, end);
        default: return encode_from<F, Format::f32>(to, from, begin, end);
    }
}

Fit encode_tiles(const MatrixRef& to, const MatrixRef& from, int64_t begin, int64_t end) {
    switch (to.format) {
        case Format::tiles_int8: return encode_format<Format::tiles_int8>(to, from, begin, end);
        case Format::tiles_int4: return encode_format<Format::tiles_int4>(to, from, begin, end);
        case Format::tiles_uint4: return encode_format<Format::tiles_uint4>(to, from, begin, end);
        case Format::tiles_int3: return encode_format<Format::tiles_int3>(to, from, begin, end);
        case Format::tiles_int2: return encode_format<Format::tiles_int2>(to, from, begin, end);
        case Format::tiles_mxfp4: return encode_format<Format::tiles_mxfp4>(to, from, begin, end);
        default: return encode_format<Format::tiles_nested>(to, from, begin, end);
    }
}

}  // namespace
}  // namespace moestro
