// What a cache of experts would have done with a recorded run, counted natively; the policy objects of the engine are the reference.
#pragma once
#include <cstdint>
#include <vector>

namespace moestro {

// Every demand of a trace. Demand d is of layer d % layers; its keys, experts of all layers numbered through, are
// key[start[d]] to key[start[d + 1]], without repetition and in the order in which a policy is told of them.
struct Asked {
    const uint16_t* key;
    const int64_t* start;       // demands + 1
    const uint8_t* prefill;     // per pass of all layers
    const int64_t* first;       // layers + 1: number of a layer's first expert
    int64_t demands, layers;
    int64_t experts() const { return first[layers]; }
};

enum class Policy { lru, lfu, belady, arc };

// Writes key and start of the passes whose tokens are cut[p] to cut[p + 1]; rows of one token ascend, others come most wanted first.
template <class Id>
void list_demands(const Id* experts, int64_t layers, int64_t tokens, int64_t slots, const int64_t* cut, int64_t passes,
                  const int64_t* first, uint16_t* key, int64_t* start);

// tally: [budgets, 2 (decode, prefill), layers, 3 (demands, misses, evictions)], added to. slots ascend. layer: -1 for one pool of all.
void count_replay(const Asked& asked, Policy policy, int64_t layer, const int64_t* slots, int64_t budgets, int64_t* tally);

}  // namespace moestro
