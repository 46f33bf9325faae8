#include <vector>

#include "kernels.hpp"

namespace moestro {

void sort_pairs(const int64_t* experts, const float* weights, int64_t* token, int64_t* slot, int64_t* expert, float* weight,
                int64_t* starts, int64_t tokens, int64_t slots, int64_t num_experts) {
    for (int64_t e = 0; e <= num_experts; ++e) starts[e] = 0;
    for (int64_t i = 0; i < tokens * slots; ++i)
        if (experts[i] >= 0) ++starts[experts[i] + 1];
    for (int64_t e = 0; e < num_experts; ++e) starts[e + 1] += starts[e];
    std::vector<int64_t> next(starts, starts + num_experts);
    for (int64_t i = 0; i < tokens * slots; ++i) {
        if (experts[i] < 0) continue;
        const int64_t n = next[experts[i]]++;
        token[n] = i / slots;
        slot[n] = i % slots;
        expert[n] = experts[i];
        weight[n] = weights[i];
    }
}

}  // namespace moestro
