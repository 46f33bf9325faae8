// The arithmetic of a tile, for the vector type V of the including file (see ffn_scalar.cpp for what V must offer).
//
// The law: every dot product is V::LANES running sums, lane j taking inputs j, j + LANES, j + 2 LANES ... in this order with one
// multiply-add each, and then one fixed tree over the lanes. Few rows read the weights as they are; many rows first expand a
// tile to float and keep the running sums in memory between blocks of inputs. Both do the same steps in the same order.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "ffn.hpp"

namespace moestro {
namespace {

constexpr int UNIT = 32;  // inputs per step: the smallest group, and a multiple of LANES
constexpr int QUAD = 4;   // output rows per register tile
constexpr int PASS = 4;   // tokens that take the weights as stored at once

// Not std::min: an inline function of the library compiled with this file's flags could be linked into portable code.
template <class T>
inline T lesser(T a, T b) {
    return a < b ? a : b;
}

template <Format F>
constexpr bool grouped = F == Format::int8 || F == Format::int4 || F == Format::mxfp4 || F == Format::uint4;

// How a row's scales are stored; worked out once per product, for a division per unit would cost as much as the unit.
struct Scales {
    int shift;  // log2 of the group
    bool half;
    explicit Scales(const MatrixRef& w) : shift(w.group ? __builtin_ctz(static_cast<unsigned>(w.group)) : 0), half(w.half_scales) {}
};

// What a unit of a row needs besides its data.
struct Scale {
    V by, offset;  // for MXFP4 `by` is whatever V::mxfp4_table makes of the scale
};

template <Format F>
inline Scale scale_of(const Scales& how, const uint8_t* row_scales, int64_t column) {
    if constexpr (!grouped<F>) {
        (void)how, (void)row_scales, (void)column;
        return {V::zero(), V::zero()};
    } else {
        float value;
        if constexpr (F == Format::mxfp4) {  // 2^(e - 127); 255 is not-a-number
            const uint32_t e = row_scales[column / 32];
            const uint32_t bits = e == 0 ? 0x00400000u : e == 255 ? 0x7fc00000u : e << 23;
            std::memcpy(&value, &bits, 4);
            return {V::mxfp4_table(value), V::zero()};
        } else if constexpr (F == Format::uint4) {
            uint16_t bits[2];
            std::memcpy(bits, row_scales + 4 * (column >> how.shift), 4);
            return {V::set(V::half(bits[0])), V::set(V::half(bits[1]))};
        } else if (how.half) {
            uint16_t bits;
            std::memcpy(&bits, row_scales + 2 * (column >> how.shift), 2);
            value = V::half(bits);
        } else {
            std::memcpy(&value, row_scales + 4 * (column >> how.shift), 4);
        }
        return {V::set(value), V::set(-8.0f * value)};
    }
}

template <Format F>
inline V weights_at(const uint8_t* row, int64_t column, const Scale& scale) {
    (void)scale;
    if constexpr (F == Format::f32) return V::load(reinterpret_cast<const float*>(row) + column);
    if constexpr (F == Format::f16) return V::load_f16(row + 2 * column);
    if constexpr (F == Format::bf16) return V::load_bf16(row + 2 * column);
    if constexpr (F == Format::int8) return V::mul(V::load_int8(row + column), scale.by);
    if constexpr (F == Format::int4) return V::scaled_int4(row + column / 2, scale.by, scale.offset);
    if constexpr (F == Format::uint4) return V::scaled_uint4(row + column / 2, scale.by, scale.offset);
    if constexpr (F == Format::mxfp4) return V::scaled_mxfp4(row + column / 2, scale.by);
}

// The last 1..LANES-1 inputs, zeros beyond. Only whole-number formats have rows that are no multiple of UNIT.
template <Format F>
inline V weights_part(const uint8_t* row, int64_t column, int count) {
    constexpr int size = F == Format::f32 ? 4 : 2;
    alignas(64) uint8_t buffer[V::LANES * 4] = {};
    std::memcpy(buffer, row + column * size, static_cast<size_t>(count) * size);
    return weights_at<F>(buffer, 0, Scale{V::zero(), V::zero()});
}

inline V values_part(const float* x, int count) {
    alignas(64) float buffer[V::LANES] = {};
    std::memcpy(buffer, x, static_cast<size_t>(count) * 4);
    return V::load(buffer);
}

template <Format F>
constexpr int64_t unit_bytes = F == Format::f32 ? 128 : F == Format::int8 ? 32 : grouped<F> ? 16 : 64;

struct Rows {  // the rows of a quad; short quads repeat their last row
    const uint8_t* data[QUAD];
    const uint8_t* scales[QUAD];
    Rows(const MatrixRef& w, int64_t first, int count) {
        for (int i = 0; i < QUAD; ++i) {
            const int64_t row = first + lesser(i, count - 1);
            data[i] = w.data + row * w.stride;
            scales[i] = w.scales + row * w.scale_stride;
        }
    }
};

// R tokens against up to QUAD output rows as they are stored; out[r * TILE + i].
template <Format F, int R>
void direct(const MatrixRef& w, int64_t first, int count, const float* const* x, float* out) {
    const int64_t cols = w.cols, whole = cols / UNIT * UNIT;
    const Rows rows(w, first, count);
    const Scales how(w);
    V sums[QUAD][R];
    for (int i = 0; i < QUAD; ++i)
        for (int r = 0; r < R; ++r) sums[i][r] = V::zero();
    int64_t c = 0;
    for (; c < whole; c += UNIT) {
#pragma GCC unroll 4  // or the sums live in memory
        for (int i = 0; i < QUAD; ++i) {
            const uint8_t* row = rows.data[i];
            // The same place of the next quad: hardware prefetch stops at each page, and rows are about a page long.
            const uint8_t* ahead = row + QUAD * w.stride + c / UNIT * unit_bytes<F>;
            V::prefetch(ahead);
            if constexpr (unit_bytes<F> > 64) V::prefetch(ahead + 64);
            const Scale scale = scale_of<F>(how, rows.scales[i], c);
            for (int j = 0; j < UNIT; j += V::LANES) {
                const V weight = weights_at<F>(row, c + j, scale);
                for (int r = 0; r < R; ++r) sums[i][r] = V::fma(weight, V::load(x[r] + c + j), sums[i][r]);
            }
        }
    }
    if constexpr (!grouped<F>) {
        for (; c < cols; c += V::LANES) {
            const int part = static_cast<int>(lesser<int64_t>(V::LANES, cols - c));
            V values[R];
            for (int r = 0; r < R; ++r) values[r] = values_part(x[r] + c, part);
            for (int i = 0; i < QUAD; ++i) {
                const V weight = weights_part<F>(rows.data[i], c, part);
                for (int r = 0; r < R; ++r) sums[i][r] = V::fma(weight, values[r], sums[i][r]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        float four[QUAD];
        V::sum4(sums[0][r], sums[1][r], sums[2][r], sums[3][r], four);
        for (int i = 0; i < count; ++i) out[r * TILE + i] = four[i];
    }
}

template <Format F, int R>
void direct_of(int take, const MatrixRef& w, int64_t first, int count, const float* const* x, float* out) {
    if (take == R) return direct<F, R>(w, first, count, x, out);
    if constexpr (R > 1) direct_of<F, R - 1>(take, w, first, count, x, out);
}

// weights[i * BLOCK + c]: `width` inputs from `from` of TILE output rows as float, zero-padded to whole vectors.
template <Format F>
void expand(const MatrixRef& w, int64_t first, int count, int64_t from, int width, float* weights) {
    const Scales how(w);
    for (int i = 0; i < count; ++i) {
        const uint8_t* row = w.data + (first + i) * w.stride;
        const uint8_t* scales = w.scales + (first + i) * w.scale_stride;
        float* to = weights + i * BLOCK;
        int c = 0;
        for (; c + UNIT <= width; c += UNIT) {
            // The next block of this row: it is asked for while this one is used.
            const uint8_t* ahead = row + (from + BLOCK + c) / UNIT * unit_bytes<F>;
            V::prefetch(ahead);
            if constexpr (unit_bytes<F> > 64) V::prefetch(ahead + 64);
            const Scale scale = scale_of<F>(how, scales, from + c);
            for (int j = 0; j < UNIT; j += V::LANES) V::store(to + c + j, weights_at<F>(row, from + c + j, scale));
        }
        if constexpr (!grouped<F>)
            for (; c < width; c += V::LANES)
                V::store(to + c, weights_part<F>(row, from + c, lesser<int>(V::LANES, width - c)));
    }
}

// One register tile: QUAD output rows x R tokens, `width` inputs; running sums come from and go to memory.
template <int R>
inline void micro(const float* weights, const float* const* x, int64_t from, int width, float* sums, bool begin) {
    V s[QUAD][R];
    for (int i = 0; i < QUAD; ++i)
        for (int r = 0; r < R; ++r) s[i][r] = begin ? V::zero() : V::load(sums + (r * TILE + i) * V::LANES);
    const float* xs[R];
    for (int r = 0; r < R; ++r) xs[r] = x[r] + from;
    int c = 0;
    for (; c + V::LANES <= width; c += V::LANES) {
        V values[R];
        for (int r = 0; r < R; ++r) values[r] = V::load(xs[r] + c);
        for (int i = 0; i < QUAD; ++i) {
            const V weight = V::load(weights + i * BLOCK + c);
            for (int r = 0; r < R; ++r) s[i][r] = V::fma(weight, values[r], s[i][r]);
        }
    }
    if (c < width) {
        for (int r = 0; r < R; ++r) {
            const V value = values_part(xs[r] + c, width - c);
            for (int i = 0; i < QUAD; ++i) s[i][r] = V::fma(V::load(weights + i * BLOCK + c), value, s[i][r]);
        }
    }
    for (int i = 0; i < QUAD; ++i)
        for (int r = 0; r < R; ++r) V::store(sums + (r * TILE + i) * V::LANES, s[i][r]);
}

template <int R>
inline void micro_of(int take, const float* weights, const float* const* x, int64_t from, int width, float* sums, bool begin) {
    if (take == R) return micro<R>(weights, x, from, width, sums, begin);
    if constexpr (R > 1) micro_of<R - 1>(take, weights, x, from, width, sums, begin);
}

template <Format F>
void tiled(const MatrixRef& w, int64_t first, int count, const float* const* x, int rows, float* out, Scratch& scratch) {
    const int quads = (count + QUAD - 1) / QUAD;
    for (int64_t from = 0; from < w.cols; from += BLOCK) {
        const int width = static_cast<int>(lesser<int64_t>(BLOCK, w.cols - from));
        expand<F>(w, first, count, from, width, scratch.weights);
        for (int i = count; i < quads * QUAD; ++i) std::memset(scratch.weights + i * BLOCK, 0, sizeof(float) * BLOCK);
        for (int r = 0; r < rows;) {
            const int left = rows - r;
            // One token more than fits is better halved: a single token has too few sums to hide the latency.
            const int take = left <= V::TOKENS ? left : left == V::TOKENS + 1 && left > 3 ? left / 2 : V::TOKENS;
            for (int q = 0; q < quads; ++q)
                micro_of<V::TOKENS>(take, scratch.weights + q * QUAD * BLOCK, x + r, from, width,
                                    scratch.sums + (r * TILE + q * QUAD) * V::LANES, from == 0);
            r += take;
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int q = 0; q < quads; ++q) {
            const float* s = scratch.sums + (r * TILE + q * QUAD) * V::LANES;
            V::sum4(V::load(s), V::load(s + V::LANES), V::load(s + 2 * V::LANES), V::load(s + 3 * V::LANES),
                    out + r * TILE + q * QUAD);
        }
}

template <Format F>
void product_of(const MatrixRef& w, int64_t first, int count, const float* const* x, int rows, float* out, Scratch& scratch) {
    if (w.cols == 0) {
        std::memset(out, 0, sizeof(float) * TILE * static_cast<size_t>(rows));
        return;
    }
    // Measured: expanding costs about as much as four passes over weights in groups, eight over others.
    constexpr int few = grouped<F> ? 4 : 8;
    if (rows > few) return tiled<F>(w, first, count, x, rows, out, scratch);
    for (int q = 0; q < count; q += QUAD)
        for (int r = 0; r < rows;) {
            const int passes = (rows - r + PASS - 1) / PASS, take = (rows - r) / passes;
            direct_of<F, PASS>(take, w, first + q, lesser(QUAD, count - q), x + r, out + r * TILE + q);
            r += take;
        }
}

void product(const MatrixRef& w, int64_t first, int count, const float* const* x, int rows, float* out, Scratch& scratch) {
    switch (w.format) {
        case Format::f32: return product_of<Format::f32>(w, first, count, x, rows, out, scratch);
        case Format::f16: return product_of<Format::f16>(w, first, count, x, rows, out, scratch);
        case Format::bf16: return product_of<Format::bf16>(w, first, count, x, rows, out, scratch);
        case Format::int8: return product_of<Format::int8>(w, first, count, x, rows, out, scratch);
        case Format::int4: return product_of<Format::int4>(w, first, count, x, rows, out, scratch);
        case Format::mxfp4: return product_of<Format::mxfp4>(w, first, count, x, rows, out, scratch);
        case Format::uint4: return product_of<Format::uint4>(w, first, count, x, rows, out, scratch);
        default: return;  // packed tiles have kernels of their own
    }
}

// e^x by 2^n * polynomial (Cephes), within 2 units in the last place; saturates instead of overflowing, keeps not-a-number.
inline V exponential(V x) {
    x = V::min(V::set(88.0f), V::max(V::set(-87.0f), x));
    const V n = V::round(V::mul(x, V::set(1.44269504088896341f)));
    V r = V::fma(n, V::set(-0.693359375f), x);
    r = V::fma(n, V::set(2.12194440e-4f), r);
    V p = V::set(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = V::fma(p, r, V::set(c));
    p = V::add(V::fma(p, V::mul(r, r), r), V::set(1.0f));
    return V::mul(p, V::power_of_two(n));
}

inline V sigmoid(V x) { return V::div(V::set(1.0f), V::add(V::set(1.0f), exponential(V::sub(V::zero(), x)))); }

inline V erf_gelu(V x) {
    alignas(64) float values[V::LANES];
    V::store(values, x);
    for (float& v : values) v = 0.5f * v * (1.0f + std::erf(v * 0.70710678118654752f));
    return V::load(values);
}

inline V act(V x, Activation activation) {
    switch (activation) {
        case Activation::gelu: return erf_gelu(x);
        case Activation::gelu_tanh: {  // 0.5 (1 + tanh z) is sigmoid(2 z)
            const V cube = V::mul(V::mul(V::mul(V::set(0.044715f), x), x), x);
            return V::mul(x, sigmoid(V::mul(V::set(1.5957691216057308f), V::add(x, cube))));
        }
        case Activation::relu: return V::max(V::zero(), x);
        case Activation::relu2: {
            const V positive = V::max(V::zero(), x);
            return V::mul(positive, positive);
        }
        default: return V::mul(x, sigmoid(x));
    }
}

void activate(const float* gate, const float* up, int count, Activation activation, float limit, float alpha, float* h) {
    for (int i = 0; i < count; i += V::LANES) {
        const int part = lesser<int>(V::LANES, count - i);
        const V u = values_part(up + i, part);
        V result;
        if (activation == Activation::swiglu_clamped) {
            const V top = V::set(limit);
            const V g = V::min(top, values_part(gate + i, part));
            const V v = V::max(V::set(-limit), V::min(top, u));
            result = V::mul(V::add(v, V::set(1.0f)), V::mul(g, sigmoid(V::mul(V::set(alpha), g))));
        } else if (gate) {
            result = V::mul(act(values_part(gate + i, part), activation), u);
        } else {
            result = act(u, activation);
        }
        alignas(64) float buffer[V::LANES];
        V::store(buffer, result);
        std::memcpy(h + i, buffer, static_cast<size_t>(part) * 4);
    }
}

}  // namespace
}  // namespace moestro
