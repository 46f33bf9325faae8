#include <algorithm>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"

namespace moestro {

void combine(const float* out, const int64_t* token, const int64_t* slot, const float* weight, float* y, int64_t pairs,
             int64_t tokens, int64_t width, int64_t slots, int threads) {
    std::vector<int64_t> pair_of(static_cast<size_t>(tokens * slots), -1);
    for (int64_t n = 0; n < pairs; ++n) pair_of[token[n] * slots + slot[n]] = n;
    const int64_t grain = std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(1, width * std::max<int64_t>(1, slots)));
    parallel(threads, tokens, grain, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            float* to = y + t * width;
            std::fill_n(to, width, 0.0f);
            for (int64_t k = 0; k < slots; ++k) {
                const int64_t n = pair_of[t * slots + k];
                if (n < 0) continue;
                const float* from = out + n * width;
                const float by = weight[n];
                for (int64_t d = 0; d < width; ++d) to[d] += by * from[d];
            }
        }
    });
}

}  // namespace moestro
