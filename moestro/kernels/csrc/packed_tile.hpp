// Products of packed tiles, for the vector type D of the including file: one row streams, more share what was unpacked.
#pragma once
#include "packed_law.hpp"

namespace moestro {
namespace {

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

void product(const MatrixRef& w, int64_t tile, int count, const Bundle& x, float* out) {
    in_its_format(w, [&](auto kind) {
        using K = decltype(kind);
        if (x.rows == 1) return single<K::format, K::extra>(w, tile, count, x, out);
        many<K::format, K::extra>(w, tile, count, x, out);
    });
}

}  // namespace
}  // namespace moestro
