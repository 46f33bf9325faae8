#include "step.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "half.hpp"
#include "kernels.hpp"
#include "packed.hpp"

namespace moestro {
namespace {

float* own(std::vector<float>& room, int64_t count) {
    if (room.size() < static_cast<size_t>(count)) room.resize(static_cast<size_t>(count));
    return room.data();
}

Rows3 one_row(float* data, int64_t width) { return {reinterpret_cast<char*>(data), 0, width * 4}; }  // of heads, each this wide

LinearJob job(const Affine& map, float* out) { return {&map.weight, out, map.weight.rows * 4, map.bias}; }

void norm(const LayerPlan& plan, const float* weight, float* data, int64_t heads, int64_t width) {
    const Rows3 row = one_row(data, width);
    rms_norm(row, nullptr, 1.0f, weight, plan.eps, 0.0f, row, 1, heads, width);
}

// x += residual * y, and the norm of that
void add(const LayerPlan& plan, const float* weight, float* x, float* y, float* normed) {
    const Rows3 more = one_row(y, plan.width);
    rms_norm(one_row(x, plan.width), &more, plan.residual, weight, plan.eps, 0.0f, one_row(normed, plan.width), 1, 1, plan.width);
}

void choose(const RouterPart& router, float* scores, float* wanted, int64_t* ids, float* weights) {
    const int64_t experts = router.experts, chosen = router.chosen;
    if (router.score == Score::logits) {
        topk(scores, 1, experts, chosen, ids, wanted);
        softmax(reinterpret_cast<const char*>(wanted), 0, weights, 1, chosen);
    } else {
        const auto rule = router.score == Score::softmax ? softmax : sigmoid;
        rule(reinterpret_cast<const char*>(scores), 0, scores, 1, experts);
        if (router.bias) {
            for (int64_t e = 0; e < experts; ++e) wanted[e] = scores[e] + router.bias[e];
            topk(wanted, 1, experts, chosen, ids, weights);
            for (int64_t k = 0; k < chosen; ++k) weights[k] = scores[ids[k]];
        } else {
            topk(scores, 1, experts, chosen, ids, weights);
        }
        if (router.renormalised) {
            float sum = weights[0];
            for (int64_t k = 1; k < chosen; ++k) sum += weights[k];
            sum += 1e-20f;
            for (int64_t k = 0; k < chosen; ++k) weights[k] /= sum;
        }
    }
    if (router.scale != 1.0f)
        for (int64_t k = 0; k < chosen; ++k) weights[k] *= router.scale;
}

void run_experts(const float* x, int64_t width, const std::vector<const Expert*>& experts, Activation activation, float limit,
                 float alpha, float* out, int threads) {
    const auto count = static_cast<int64_t>(experts.size());
    std::vector<int64_t> rows(static_cast<size_t>(count), 0), starts(static_cast<size_t>(count) + 1);
    for (int64_t g = 0; g <= count; ++g) starts[static_cast<size_t>(g)] = g;
    grouped_ffn({x, width * 4, rows.data(), starts.data(), experts, activation, limit, alpha, out, width * 4, nullptr, threads});
}

uint8_t* cache_row(const Cache& cache, int64_t head, int64_t at) {
    return const_cast<uint8_t*>(cache.data) + head * cache.head_stride + at * cache.stride;
}

}  // namespace

void store_row(const float* from, int64_t width, Format format, void* to) {
    if (format == Format::f32) {
        std::memcpy(to, from, static_cast<size_t>(width) * 4);
        return;
    }
    auto* bits = static_cast<uint16_t*>(to);
    if (format == Format::f16)
        for (int64_t d = 0; d < width; ++d) bits[d] = to_half(from[d]);
    else
        for (int64_t d = 0; d < width; ++d) bits[d] = to_bf16_bits(from[d]);
}

void before_experts(const LayerPlan& plan, float* x, float* normed, const CachePlace& place, const float* cos, const float* sin,
                    int64_t rotated, int64_t* ids, float* weights, int threads) {
    thread_local std::vector<float> room;
    const AttentionPart& a = plan.attention;
    const int64_t asked = a.heads * a.width, kept = a.shared * a.width, experts = plan.router ? plan.router->experts : 0;
    float* q = own(room, 2 * asked + 2 * kept + plan.width + 2 * experts);
    float *k = q + asked, *v = k + kept, *seen = v + kept, *y = seen + asked, *scores = y + plan.width;
    linears(normed, 0, 1, {job(a.q, q), job(a.k, k), job(a.v, v)}, threads);
    for (int64_t head = 0; head < a.shared; ++head)  // each head's row is on a page of its own, long out of the caches
        for (const Cache* cache : {&place.keys, &place.values})
            for (int64_t byte = 0; byte < a.width * (cache->format == Format::f32 ? 4 : 2); byte += 64) __builtin_prefetch(cache_row(*cache, head, place.at) + byte, 1);
    if (a.q_norm) norm(plan, a.q_norm, q, a.norm_heads ? a.heads : 1, a.norm_heads ? a.width : asked);
    if (a.k_norm) norm(plan, a.k_norm, k, a.norm_heads ? a.shared : 1, a.norm_heads ? a.width : kept);
    if (a.clip > 0)
        for (float* value = q; value < seen; ++value) *value = *value < -a.clip ? -a.clip : *value > a.clip ? a.clip : *value;
    const auto *c = reinterpret_cast<const char*>(cos), *s = reinterpret_cast<const char*>(sin);
    rotate(one_row(q, a.width), c, 0, s, 0, 1, a.heads, rotated / 2, a.interleaved);
    rotate(one_row(k, a.width), c, 0, s, 0, 1, a.shared, rotated / 2, a.interleaved);
    for (int64_t head = 0; head < a.shared; ++head)
        for (const auto& [cache, row] : {std::pair{&place.keys, k}, std::pair{&place.values, v}})
            store_row(row + head * a.width, a.width, cache->format, cache_row(*cache, head, place.at));
    const int64_t length = place.at + 1;
    attend({one_row(q, a.width), one_row(seen, a.width), place.keys, place.values, 1, a.heads, a.shared, &length, a.scale, a.window,
            a.sinks, 0.0f, threads});
    linears(seen, 0, 1, {job(a.o, y)}, threads);
    add(plan, plan.post_norm, x, y, normed);
    if (!plan.router) return;
    linears(normed, 0, 1, {job(plan.router->map, scores)}, threads);
    choose(*plan.router, scores, scores + experts, ids, weights);
}

void after_choice(const LayerPlan& plan, float* x, float* normed, const std::vector<const Expert*>& experts, const float* weights,
                  int threads) {
    thread_local std::vector<float> room;
    const int64_t width = plan.width, count = static_cast<int64_t>(experts.size());
    float* total = own(room, (2 + count) * width);
    float *dense = total + width, *out = dense + width;
    threads = threads_for(threads);
    if (plan.dense) {
        run_experts(normed, width, {&plan.dense->mlp}, plan.dense->activation, 0.0f, 1.0f, dense, threads);
        if (plan.dense->has_gate) {
            float gate;
            linears(normed, 0, 1, {job(plan.dense->gate, &gate)}, 1);
            sigmoid(reinterpret_cast<const char*>(&gate), 0, &gate, 1, 1);
            for (int64_t d = 0; d < width; ++d) dense[d] *= gate;
        }
    }
    if (count) {
        run_experts(normed, width, experts, plan.router->activation, plan.router->limit, plan.router->alpha, out, threads);
        std::fill_n(total, width, 0.0f);
        for (int64_t g = 0; g < count; ++g)
            for (int64_t d = 0; d < width; ++d) total[d] += weights[g] * out[g * width + d];
        if (plan.dense)
            for (int64_t d = 0; d < width; ++d) total[d] = dense[d] + total[d];
    }
    add(plan, plan.next_norm, x, count ? total : dense, normed);
}

int64_t climb(const std::vector<Storey>& storeys, int64_t first, float* x, float* normed, const std::vector<CachePlace>& places,
              const float* cos, const float* sin, int64_t rotated, const Shelf& shelf, int64_t* ids, float* weights, int64_t slots,
              int threads, Spent& spent) {
    const auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
    std::vector<const Expert*> chosen;
    double began = now();
    const auto count = static_cast<int64_t>(storeys.size());
    for (int64_t i = first; i < count; ++i) {
        const Storey& at = storeys[static_cast<size_t>(i)];
        int64_t* mine = ids + i * slots;
        float* shares = weights + i * slots;
        before_experts(*at.plan, x, normed, places[static_cast<size_t>(i - first)], cos, sin, rotated, mine, shares, threads);
        const double between = now();
        spent.before += between - began;
        chosen.clear();
        for (int64_t k = 0; at.plan->router && k < at.plan->router->chosen; ++k) {
            const Expert* expert = shares[k] == 0.0f ? nullptr : shelf.find(at.shelf, mine[k]);
            if (!expert) return i;
            if (expert->up.cols != at.plan->width || in_tiles(expert->up.format) != in_tiles((chosen.empty() ? expert : chosen[0])->up.format))
                throw std::invalid_argument("experts on the shelf do not fit their layer");
            chosen.push_back(expert);
        }
        after_choice(*at.plan, x, normed, chosen, shares, threads);
        began = now();
        spent.after += began - between;
    }
    return count;
}

}  // namespace moestro
