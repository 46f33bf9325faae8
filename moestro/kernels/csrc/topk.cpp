#include "kernels.hpp"

namespace moestro {

void topk(const float* scores, int64_t tokens, int64_t experts, int64_t k, int64_t* ids, float* values) {
    if (k == 0) return;
    for (int64_t t = 0; t < tokens; ++t) {
        const float* row = scores + t * experts;
        int64_t* best = ids + t * k;  // sorted; later experts enter only by being strictly better, so ties keep the lower id
        int64_t count = 0;
        for (int64_t e = 0; e < experts; ++e) {
            const float value = row[e];
            auto beats = [&](float other) { return value > other || (other != other && value == value); };
            if (count == k && !beats(row[best[k - 1]])) continue;
            int64_t at = count < k ? count++ : k - 1;
            for (; at > 0 && beats(row[best[at - 1]]); --at) best[at] = best[at - 1];
            best[at] = e;
        }
        for (int64_t i = 0; i < k; ++i) values[t * k + i] = row[best[i]];
    }
}

}  // namespace moestro
