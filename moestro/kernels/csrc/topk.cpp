#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels.hpp"

namespace moestro {

void topk(const float* scores, int64_t tokens, int64_t experts, int64_t k, int64_t* ids, float* values) {
    std::vector<int64_t> order(static_cast<size_t>(experts));
    for (int64_t t = 0; t < tokens; ++t) {
        const float* row = scores + t * experts;
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + k, order.end(), [row](int64_t a, int64_t b) {
            const bool a_is = row[a] == row[a], b_is = row[b] == row[b];
            if (!a_is || !b_is) return a_is != b_is ? a_is : a < b;
            return row[a] != row[b] ? row[a] > row[b] : a < b;
        });
        for (int64_t i = 0; i < k; ++i) {
            ids[t * k + i] = order[i];
            values[t * k + i] = row[order[i]];
        }
    }
}

}  // namespace moestro
