// The two halves of attention that the product of ffn_tile.hpp does not cover, for the vector type V of the including file.
//
// The law: scores of one span of keys are softened against their own largest; position p of the span adds to lane p % LANES of
// the total. Values are added key by key in their order, so neither the queries beside a query nor hidden keys change its bits.
#pragma once
#include "attention.hpp"
#include "ffn_tile.hpp"

namespace moestro {
namespace {

constexpr int AHEAD = 32;  // keys between a value's prefetch and its use

float soften(float* scores, int begin, int end, float scale, float softcap, float* top) {
    if (softcap > 0)
        for (int i = begin; i < end; ++i) scores[i] = softcap * std::tanh(scores[i] * scale / softcap);
    else
        for (int i = begin; i < end; ++i) scores[i] *= scale;
    const int from = begin / V::LANES * V::LANES, to = (end + V::LANES - 1) / V::LANES * V::LANES;
    // Neighbours that this query does not see must not show, whatever they hold.
    for (int i = from; i < begin; ++i) scores[i] = scores[begin];
    for (int i = end; i < to; ++i) scores[i] = scores[begin];
    alignas(64) float lanes[V::LANES];
    V most = V::load(scores + from);
    for (int i = from + V::LANES; i < to; i += V::LANES) most = V::max(most, V::load(scores + i));
    V::store(lanes, most);
    float largest = lanes[0];
    for (float lane : lanes) largest = lane > largest ? lane : largest;
    const V shift = V::set(largest);
    for (int i = from; i < to; i += V::LANES) V::store(scores + i, exponential(V::sub(V::load(scores + i), shift)));
    for (int i = from; i < begin; ++i) scores[i] = 0;
    for (int i = end; i < to; ++i) scores[i] = 0;
    V total = V::zero();
    for (int i = from; i < to; i += V::LANES) total = V::add(total, V::load(scores + i));
    V::store(lanes, total);
    for (int half = V::LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    *top = largest;
    return lanes[0];
}

struct Panel {  // PANEL columns of the values, expanded to float
    const float* data;
    V at(int key, int column) const { return V::load(data + key * PANEL + column); }
    void ahead(int) const {}
};

template <Format F>
struct Stored {  // the same as they lie in the cache
    const uint8_t* data;
    int64_t stride, column;
    V at(int key, int c) const { return weights_at<F>(data + key * stride, column + c, Scale{V::zero(), V::zero()}); }
    void ahead(int key) const {
        constexpr int item = F == Format::f32 ? 4 : 2;
        const uint8_t* p = data + (key + AHEAD) * stride + column * item;
        V::prefetch(p);
        if constexpr (item * PANEL > 64) V::prefetch(p + 64);
    }
};

template <int R, class Source>
inline void blend_run(const Source& source, const float* weights, int from, int to, float* sums, int64_t sums_stride) {
    constexpr int PARTS = PANEL / V::LANES;
    if (from >= to) return;
    V s[R][PARTS];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < PARTS; ++c) s[r][c] = V::load(sums + r * sums_stride + c * V::LANES);
    for (int k = from; k < to; ++k) {
        source.ahead(k);
        V by[R];
        for (int r = 0; r < R; ++r) by[r] = V::set(weights[r * SPAN + k]);
        for (int c = 0; c < PARTS; ++c) {
            const V value = source.at(k, c * V::LANES);
            for (int r = 0; r < R; ++r) s[r][c] = V::fma(by[r], value, s[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < PARTS; ++c) V::store(sums + r * sums_stride + c * V::LANES, s[r][c]);
}

// `rows` queries: what all of them see together, what only some see one by one, each in the order of the keys.
template <int R, class Source>
inline void blend_rows(int rows, const Source& source, const float* weights, const int* begin, const int* end, int first, int last,
                       float* sums, int64_t sums_stride) {
    if constexpr (R > 1)
        if (rows < R) return blend_rows<R - 1>(rows, source, weights, begin, end, first, last, sums, sums_stride);
    int common = first, until = last;
    for (int r = 0; r < R; ++r) common = begin[r] > common ? begin[r] : common, until = lesser(end[r], until);
    const bool shared = common < until;
    for (int r = 0; r < R; ++r) {
        const int from = begin[r] > first ? begin[r] : first, to = lesser(end[r], last);
        blend_run<1>(source, weights + r * SPAN, from, shared ? common : to, sums + r * sums_stride, sums_stride);
    }
    if (!shared) return;
    blend_run<R>(source, weights, common, until, sums, sums_stride);
    for (int r = 0; r < R; ++r)
        blend_run<1>(source, weights + r * SPAN, until, lesser(end[r], last), sums + r * sums_stride, sums_stride);
}

template <Format F>
void blend_of(const Cache& values, int64_t position, const float* weights, const int* begin, const int* end, int rows, float* sums,
              int64_t sums_stride, Scratch& scratch) {
    const uint8_t* data = values.data + position * values.stride;
    int first = SPAN, last = 0;
    for (int r = 0; r < rows; ++r)
        if (begin[r] < end[r]) first = lesser(begin[r], first), last = end[r] > last ? end[r] : last;
    // Few queries read the values where they lie, in pieces that stay in the first cache from panel to panel.
    const int piece = rows <= 3 ? AHEAD : SPAN;
    for (; first < last; first += piece) {
        const int stop = lesser(first + piece, last);
        for (int64_t column = 0; column < values.width; column += PANEL) {
            const int width = static_cast<int>(lesser<int64_t>(PANEL, values.width - column));
            if (rows <= 3 && width == PANEL) {
                const Stored<F> source{data, values.stride, column};
                blend_rows<3>(rows, source, weights, begin, end, first, stop, sums + column, sums_stride);
                continue;
            }
            float* panel = scratch.sums;
            for (int k = first; k < stop; ++k) {
                const uint8_t* row = data + k * values.stride;
                int c = 0;
                for (; c + V::LANES <= width; c += V::LANES)
                    V::store(panel + k * PANEL + c, weights_at<F>(row, column + c, Scale{V::zero(), V::zero()}));
                for (; c < PANEL; c += V::LANES)
                    V::store(panel + k * PANEL + c, c < width ? weights_part<F>(row, column + c, width - c) : V::zero());
            }
            for (int r = 0, take; r < rows; r += take) {
                // Evenly: a single query has too few sums to hide the latency.
                take = (rows - r) / ((rows - r + V::TOKENS - 1) / V::TOKENS);
                blend_rows<V::TOKENS>(take, Panel{panel}, weights + r * SPAN, begin + r, end + r, first, stop,
                                      sums + r * sums_stride + column, sums_stride);
            }
        }
    }
}

void blend(const Cache& values, int64_t position, const float* weights, const int* begin, const int* end, int rows, float* sums,
           int64_t sums_stride, Scratch& scratch) {
    switch (values.format) {
        case Format::f32: return blend_of<Format::f32>(values, position, weights, begin, end, rows, sums, sums_stride, scratch);
        case Format::f16: return blend_of<Format::f16>(values, position, weights, begin, end, rows, sums, sums_stride, scratch);
        default: return blend_of<Format::bf16>(values, position, weights, begin, end, rows, sums, sums_stride, scratch);
    }
}

}  // namespace
}  // namespace moestro
