// The arithmetic of packed tiles, for the vector type D of the including file (see packed_scalar.cpp for what D must offer).
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

template <Format F>
constexpr int largest_code = F == Format::tiles_int4 || F == Format::tiles_uint4 ? 15 : F == Format::tiles_mxfp4 ? 24 : F == Format::tiles_int3 ? 7 : 3;

// The sum of STEP products per row, taken word by word.
template <Format F>
struct Dot {
    static constexpr bool SIGNED = F == Format::tiles_int8;
    D::Sum<SIGNED ? -1 : largest_code<F>> sum;
    void add(int j, Bytes w, Bytes a) { sum.add(j, w, a); }
    Ints total() const { return sum.total(); }
};

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
    Floats added(Ints dot, Ints total, Floats by, int part, Floats sums) const {
        sums = D::fma(D::to_float(whole(dot, total, part)), D::mul(scale[part], by), sums);
        if constexpr (F == Format::tiles_uint4) sums = D::fma(D::to_float(total), D::mul(minimum[part], by), sums);
        return sums;
    }
};

// One step of one plane of W tiles for one row; its sums stay in registers. Word by word for all: in another order it takes half as
// long again.
template <Format F, int W>
inline void add_single(const uint8_t* const* p, const Unit<F>* units, const int8_t* codes, Floats by, Ints total, Floats (*sums)[PARTS]) {
    Dot<F> dots[W][PARTS];
#pragma GCC unroll 8
    for (int j = 0; j < WORDS; ++j) {
        const Bytes a = D::broadcast(codes + 4 * j);
#pragma GCC unroll 4
        for (int t = 0; t < W; ++t)
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; ++part) dots[t][part].add(j, word<F>(p[t], part, j), a);
    }
#pragma GCC unroll 4
    for (int t = 0; t < W; ++t)
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) sums[t][part] = units[t].added(dots[t][part].total(), total, by, part, sums[t][part]);
}

// One step of one plane for R rows; their sums are in memory. words(part, j) gives the codes.
template <Format F, int R, class Words>
inline void add_rows(Words&& words, const Unit<F>& unit, const int8_t* codes, const float* scales, const int32_t* totals, float* sums) {
    Dot<F> dots[R][PARTS];
#pragma GCC unroll 8
    for (int j = 0; j < WORDS; ++j) {
        Bytes w[PARTS];
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) w[part] = words(part, j);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Bytes a = D::broadcast(codes + r * STEP + 4 * j);
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; ++part) dots[r][part].add(j, w[part], a);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const Floats by = D::set(scales[r]);
        const Ints total = D::set(totals[r]);
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) {
            float* to = sums + r * TILE + part * D::LANES;
            D::store(to, unit.added(dots[r][part].total(), total, by, part, D::load_floats(to)));
        }
    }
}

// Few rows take the codes as they are read.
template <Format F, int R>
inline void add_few(int rows, const uint8_t* p, const Unit<F>& unit, const int8_t* codes, const float* scales, const int32_t* totals,
                    float* sums) {
    if (rows == R) return add_rows<F, R>([p](int part, int j) { return word<F>(p, part, j); }, unit, codes, scales, totals, sums);
    if constexpr (R > 1) add_few<F, R - 1>(rows, p, unit, codes, scales, totals, sums);
}

// One step of one plane for all rows of a bundle, more than one.
template <Format F>
inline void add_many(const uint8_t* p, const Unit<F>& unit, const Bundle& x, int64_t block, float* sums) {
    constexpr int R = D::ROWS, PASS = 4, FEW = 12;  // measured: unpacking thrice costs less than keeping what was unpacked
    const int rows = x.rows;
    const int8_t* codes = x.codes + block * rows * STEP;
    const float* scales = x.scales + block * rows;
    const int32_t* totals = x.sums + block * rows;
    if (rows <= FEW) {
        for (int r = 0; r < rows; r += PASS)
            add_few<F, PASS>(rows - r < PASS ? rows - r : PASS, p, unit, codes + r * STEP, scales + r, totals + r, sums + r * TILE);
        return;
    }
    Bytes w[PARTS][WORDS];
    for (int part = 0; part < PARTS; ++part)
#pragma GCC unroll 8
        for (int j = 0; j < WORDS; ++j) w[part][j] = word<F>(p, part, j);
    const auto words = [&w](int part, int j) { return w[part][j]; };
    int r = 0;
    for (; r + R <= rows; r += R) add_rows<F, R>(words, unit, codes + r * STEP, scales + r, totals + r, sums + r * TILE);
    for (; r < rows; ++r) add_rows<F, 1>(words, unit, codes + r * STEP, scales + r, totals + r, sums + r * TILE);
}

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

// One row times `count` tiles of each of W runs, the second of which begins where the first ends: each activation is fetched once for
// both, and memory is read at two places.
template <Format F, int EXTRA, int W>
void runs(const MatrixRef& w, int64_t tile, int count, const Bundle& x, float* out) {
    using S = Streams<F, EXTRA>;
    const uint8_t *p[W], *q[2][W];
    for (int t = 0; t < W; ++t) {
        const S s(w, tile + t * count);
        p[t] = s.p;
        for (int e = 0; e < 2; ++e) q[e][t] = s.q[e];
    }
    const float* const end = x.scales + w.cols / STEP;
    const int steps = w.group / STEP;
    for (int at = 0; at < count; ++at, out += TILE) {
        const int8_t* codes = x.codes;
        const float* scales = x.scales;
        const int32_t* totals = x.sums;
        Floats sums[W][PARTS];
        for (auto& tile_sums : sums)
            for (auto& sum : tile_sums) sum = D::set(0.0f);
        while (scales != end) {
            Unit<F> units[W];
            Unit<S::SIGN> thirds[W], fourths[W];
            for (int t = 0; t < W; ++t) {
                units[t].read(p[t]);
                D::prefetch(p[t] + AHEAD);
                p[t] += head_bytes(F);
                for (int e = 0; e < EXTRA; ++e) {
                    (e ? fourths : thirds)[t].read(q[e][t]);
                    q[e][t] += head_bytes(S::SIGN);
                }
            }
            for (int i = 0; i < steps; ++i) {
                for (int t = 0; t < W; ++t) {
                    for (int k = 0; k < step_bytes(F); k += 64) D::prefetch(p[t] + AHEAD + k);
                    for (int e = 0; e < EXTRA; ++e) D::prefetch(q[e][t] + AHEAD);
                }
                const Floats by = D::set(*scales++);
                const Ints total = D::set(*totals++);
                add_single<F, W>(p, units, codes, by, total, sums);
                if constexpr (EXTRA > 0) add_single<S::SIGN, W>(q[0], thirds, codes, by, total, sums);
                if constexpr (EXTRA > 1) add_single<S::SIGN, W>(q[1], fourths, codes, by, total, sums);
                codes += STEP;
                for (int t = 0; t < W; ++t) {
                    p[t] += step_bytes(F);
                    for (int e = 0; e < EXTRA; ++e) q[e][t] += step_bytes(S::SIGN);
                }
            }
        }
        for (int t = 0; t < W; ++t)
            for (int part = 0; part < PARTS; ++part) D::store(out + t * count * TILE + part * D::LANES, sums[t][part]);
    }
}

template <Format F, int EXTRA>
void single(const MatrixRef& w, int64_t tile, int count, const Bundle& x, float* out) {
    const int half = EXTRA ? 0 : count / 2;
    if (half) runs<F, EXTRA, 2>(w, tile, half, x, out);
    if (2 * half < count) runs<F, EXTRA, 1>(w, tile + 2 * half, count - 2 * half, x, out + 2 * half * TILE);
}

template <Format F, int EXTRA>
void many(const MatrixRef& w, int64_t tile, int count, const Bundle& x, float* out) {
    using S = Streams<F, EXTRA>;
    S s(w, tile);
    const int64_t blocks = w.cols / STEP;
    const int steps = w.group / STEP;
    for (int i = 0; i < count * x.rows * TILE; ++i) out[i] = 0.0f;
    for (int t = 0; t < count; ++t, out += x.rows * TILE)
        for (int64_t b = 0; b < blocks;) {
            const Unit<F> unit(s.p);
            const Unit<S::SIGN> third(EXTRA > 0 ? s.q[0] : s.p), fourth(EXTRA > 1 ? s.q[1] : s.p);
            s.head();
            for (int i = 0; i < steps; ++i, ++b) {
                s.prefetch();
                add_many<F>(s.p, unit, x, b, out);
                if constexpr (EXTRA > 0) add_many<S::SIGN>(s.q[0], third, x, b, out);
                if constexpr (EXTRA > 1) add_many<S::SIGN>(s.q[1], fourth, x, b, out);
                s.step();
            }
        }
}

template <Format F, int EXTRA = 0>
void product_of(const MatrixRef& w, int64_t tile, int count, const Bundle& x, float* out) {
    if (x.rows == 1) return single<F, EXTRA>(w, tile, count, x, out);
    many<F, EXTRA>(w, tile, count, x, out);
}

void product(const MatrixRef& w, int64_t tile, int count, const Bundle& x, float* out) {
    switch (w.format) {
        case Format::tiles_int8: return product_of<Format::tiles_int8>(w, tile, count, x, out);
        case Format::tiles_int4: return product_of<Format::tiles_int4>(w, tile, count, x, out);
        case Format::tiles_int3: return product_of<Format::tiles_int3>(w, tile, count, x, out);
        case Format::tiles_int2: return product_of<Format::tiles_int2>(w, tile, count, x, out);
        case Format::tiles_mxfp4: return product_of<Format::tiles_mxfp4>(w, tile, count, x, out);
        case Format::tiles_nested:
            if (w.fourth) return product_of<Format::tiles_nested, 2>(w, tile, count, x, out);
            if (w.third) return product_of<Format::tiles_nested, 1>(w, tile, count, x, out);
            return product_of<Format::tiles_nested, 0>(w, tile, count, x, out);
        case Format::tiles_uint4: return product_of<Format::tiles_uint4>(w, tile, count, x, out);
        default: return;
    }
}

}  // namespace
}  // namespace moestro
