// One row through decoder layers, made of the other kernels: what lies before the choice of experts, what after, and both in turns as
// long as the chosen experts are in memory.
#pragma once
#include <cstdint>
#include <memory>
#include <stdexcept>
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

// Where experts lie in memory, by layer and number; null: not in memory. The weights are their owner's.
class Shelf {
public:
    Shelf(int64_t layers, int64_t experts) : experts_(experts), at_(static_cast<size_t>(layers * experts), nullptr) {}
    void put(int64_t layer, int64_t expert, const Expert* at) { place(layer, expert) = at; }
    const Expert* find(int64_t layer, int64_t expert) const { return const_cast<Shelf*>(this)->place(layer, expert); }

private:
    const Expert*& place(int64_t layer, int64_t expert) {
        if (layer < 0 || expert < 0 || expert >= experts_) throw std::out_of_range("no such place on the shelf");
        return at_.at(static_cast<size_t>(layer * experts_ + expert));
    }
    int64_t experts_;
    std::vector<const Expert*> at_;
};

struct Spent {  // seconds, so far
    double before = 0, after = 0;
};

struct Storey {  // a layer of a stack, and which layer of the shelf its experts are in
    const LayerPlan* plan;
    int64_t shelf;
};

// Layers from `first` on; places, ids and weights (`slots` each) are by layer. Returns the layer whose choice is made but whose experts
// are not all in memory, or have a weight of nothing; else the number of layers.
int64_t climb(const std::vector<Storey>& storeys, int64_t first, float* x, float* normed, const std::vector<CachePlace>& places,
              const float* cos, const float* sin, int64_t rotated, const Shelf& shelf, int64_t* ids, float* weights, int64_t slots,
              int threads, Spent& spent);

// Rounds float32 to a cache's format.
void store_row(const float* from, int64_t width, Format format, void* to);

}  // namespace moestro
