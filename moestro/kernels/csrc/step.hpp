// One row through one decoder layer in two calls, made of the other kernels: what lies before the choice of experts, and what after.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "trunk.hpp"

namespace moestro {

struct Affine {
    MatrixRef weight{};
    const float* bias = nullptr;
};

struct AttentionPart {
    Affine q, k, v, o;
    int64_t heads, shared, width;     // `shared` heads of keys and values
    const float *q_norm, *k_norm;     // or null
    bool norm_heads;                  // else over all heads at once
    float clip;                       // 0: none
    bool interleaved;
    float scale;
    int64_t window;                   // 0: all
    const float* sinks;               // or null
};

enum class Score : int { logits, softmax, sigmoid };

struct RouterPart {
    Affine map;
    int64_t experts, chosen;
    Score score;            // logits: softmax over the chosen
    const float* bias;      // on the choice alone, or null
    bool renormalised;
    float scale;
    Activation activation;  // of the experts
    float limit, alpha;
};

struct DensePart {  // what every row passes, times the sigmoid of its gate
    Expert mlp;
    bool has_gate;
    Affine gate;
    Activation activation;
};

struct LayerPlan {
    int64_t width;
    float eps, residual;
    const float *post_norm, *next_norm;
    AttentionPart attention;
    std::unique_ptr<RouterPart> router;  // or null
    std::unique_ptr<DensePart> dense;    // or null
};

struct CachePlace {  // rooms [shared, capacity, width] of one layer, and where the row goes
    Cache keys, values;  // as attention takes them, with all positions up to the row's
    int64_t at;
};

// x: the residual stream, normed: its normalised image; both move on. ids, weights: the router's choice, when there is a router.
void before_experts(const LayerPlan& plan, float* x, float* normed, const CachePlace& place, const float* cos, const float* sin,
                    int64_t rotated, int64_t* ids, float* weights, int threads);
// experts: in the order of the weights; none without a router.
void after_choice(const LayerPlan& plan, float* x, float* normed, const std::vector<const Expert*>& experts, const float* weights,
                  int threads);

// Rounds float32 to a cache's format.
void store_row(const float* from, int64_t width, Format format, void* to);

}  // namespace moestro
