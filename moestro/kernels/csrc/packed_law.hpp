// How packed tiles are read and what their numbers mean, for the vector type D of the including file (see packed_scalar.cpp for what
// D must offer).
//
// The law: STEP products are summed as whole numbers, which is exact in any order; then each plane adds
// dot * (weight scale * activation scale) to its row's sum with one fused multiply-add, block after block. The minimums of uint4
// are a second plane of ones.
#pragma once
#include <cstdint>

#include "packed.hpp"

namespace moestro {
namespace {

using Bytes = D::Bytes;    // LANES rows x 4 inputs
using Ints = D::Ints;      // LANES rows
using Floats = D::Floats;  // LANES rows

constexpr int PARTS = TILE / D::LANES;  // registers per tile
constexpr int WORDS = STEP / 4;         // registers of codes per step and part

// Register `j` of part `part`: inputs 4 j to 4 j + 3, as codes without sign; int8 alone is signed.
template <Format F>
inline Bytes word(const uint8_t* p, int part, int j) {
    const auto at = [&](int w) { return D::load(p + 4 * TILE * w + 4 * D::LANES * part); };
    if constexpr (F == Format::tiles_int8) return at(j);
    if constexpr (F == Format::tiles_int4 || F == Format::tiles_uint4) return D::bits(at(j / 2), j % 2 * 4, 15);
    if constexpr (F == Format::tiles_mxfp4) return D::mxfp4(D::bits(at(j / 2), j % 2 * 4, 15));  // twice the value, and 12
    if constexpr (F == Format::tiles_int2 || F == Format::tiles_nested) return D::bits(at(j / 4), j % 4 * 2, 3);
    if constexpr (F == Format::tiles_sign) return D::bits(at(0), j, 1);
    if constexpr (F == Format::tiles_int3) {
        const Bytes high = at(2);  // D::bits wants a shift to the right
        return D::either(D::bits(at(j / 4), j % 4 * 2, 3), j < 2 ? D::bits(D::doubled(high, 2 - j), 0, 4) : D::bits(high, j - 2, 4));
    }
}

// Scales of a unit, and what turns the sum of codes x activations into the dot product in units of them.
template <Format F>
struct Unit {
    Floats scale[PARTS];
    Ints zero[PARTS];
    Floats minimum[PARTS];
    Unit() = default;
    explicit Unit(const uint8_t* head) { read(head); }
    void read(const uint8_t* head) {
        for (int i = 0; i < PARTS; ++i) {
            if constexpr (F == Format::tiles_mxfp4)
                scale[i] = D::half_powers(head + D::LANES * i);
            else
                scale[i] = D::halves(head + 2 * D::LANES * i);
            if constexpr (F == Format::tiles_nested) {
                scale[i] = D::mul(scale[i], D::set(1.0f / 64));
                zero[i] = D::wide(head + 2 * TILE + D::LANES * i);
            }
            if constexpr (F == Format::tiles_uint4) minimum[i] = D::halves(head + 2 * TILE + 2 * D::LANES * i);
        }
    }
    Ints whole(Ints dot, Ints sum, int part) const {
        if constexpr (F == Format::tiles_int8) return D::INT8_ZERO ? D::minus(dot, D::times(sum, D::set(D::INT8_ZERO))) : dot;
        if constexpr (F == Format::tiles_int4) return D::minus(dot, D::left(sum, 3));
        if constexpr (F == Format::tiles_mxfp4) return D::minus(dot, D::times(sum, D::set(12)));
        if constexpr (F == Format::tiles_int3) return D::minus(D::left(dot, 1), D::times(sum, D::set(7)));
        if constexpr (F == Format::tiles_int2) return D::minus(D::left(dot, 1), D::times(sum, D::set(3)));
        if constexpr (F == Format::tiles_sign) return D::minus(D::left(dot, 1), sum);
        if constexpr (F == Format::tiles_nested) return D::minus(D::left(dot, 6), D::times(sum, zero[part]));
        if constexpr (F == Format::tiles_uint4) return dot;
    }
    // `sums` and what a step adds: `total` is the sum of its activations' codes, `by` their scale.
    Floats added(Ints dot, Ints total, Floats by, int part, Floats sums) const { return added_whole(whole(dot, total, part), total, by, part, sums); }
    Floats added_whole(Ints whole, Ints total, Floats by, int part, Floats sums) const {
        sums = D::fma(D::to_float(whole), D::mul(scale[part], by), sums);
        if constexpr (F == Format::tiles_uint4) sums = D::fma(D::to_float(total), D::mul(minimum[part], by), sums);
        return sums;
    }
};

// A tile's planes as they are read: the base, and EXTRA planes of nested weights.
template <Format F, int EXTRA>
struct Streams {
    static constexpr Format SIGN = Format::tiles_sign;
    const uint8_t *p, *q[2] = {};
    Streams(const MatrixRef& w, int64_t tile) : p(w.data + tile * tile_bytes(F, w.cols, w.group)) {
        if (EXTRA > 0) q[0] = w.third + tile * tile_bytes(SIGN, w.cols, w.group);
        if (EXTRA > 1) q[1] = w.fourth + tile * tile_bytes(SIGN, w.cols, w.group);
    }
    void head() {
        D::prefetch(p + AHEAD);
        p += head_bytes(F);
        for (int e = 0; e < EXTRA; ++e) q[e] += head_bytes(SIGN);
    }
    void prefetch() const {
        for (int i = 0; i < step_bytes(F); i += 64) D::prefetch(p + AHEAD + i);
        for (int e = 0; e < EXTRA; ++e) D::prefetch(q[e] + AHEAD);
    }
    void step() {
        p += step_bytes(F);
        for (int e = 0; e < EXTRA; ++e) q[e] += step_bytes(SIGN);
    }
};

// each(Kind) with the format of `w` and the number of its further planes as constants.
template <Format F, int EXTRA>
struct Kind {
    static constexpr Format format = F;
    static constexpr int extra = EXTRA;
};
template <class Each>
inline void in_its_format(const MatrixRef& w, Each&& each) {
    switch (w.format) {
        case Format::tiles_int8: return each(Kind<Format::tiles_int8, 0>());
        case Format::tiles_int4: return each(Kind<Format::tiles_int4, 0>());
        case Format::tiles_int3: return each(Kind<Format::tiles_int3, 0>());
        case Format::tiles_int2: return each(Kind<Format::tiles_int2, 0>());
        case Format::tiles_mxfp4: return each(Kind<Format::tiles_mxfp4, 0>());
        case Format::tiles_nested:
            if (w.fourth) return each(Kind<Format::tiles_nested, 2>());
            if (w.third) return each(Kind<Format::tiles_nested, 1>());
            return each(Kind<Format::tiles_nested, 0>());
        case Format::tiles_uint4: return each(Kind<Format::tiles_uint4, 0>());
        default: return;
    }
}

}  // namespace
}  // namespace moestro
