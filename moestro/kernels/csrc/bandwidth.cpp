#include <atomic>
#include <chrono>
#include <cstring>

#include "kernels.hpp"
#include "pool.hpp"

namespace moestro {

double read_bandwidth(const void* buffer, int64_t bytes, double seconds, int threads) {
    using Clock = std::chrono::steady_clock;
    const auto* words = static_cast<const uint64_t*>(buffer);
    std::atomic<uint64_t> sink{0};  // what is read must be used, or it is not read
    const auto began = Clock::now();
    double best = 0;
    do {
        const auto start = Clock::now();
        parallel(threads, bytes / 8, 1 << 17, [&](int64_t begin, int64_t end) {
            // Four places at once and about a page ahead, as the expert kernels read: hardware prefetch does not cross pages.
            uint64_t sums[8] = {};
            const int64_t quarter = (end - begin) / 4 / 8 * 8;
            for (int64_t i = 0; i < quarter; i += 8)
                for (int stream = 0; stream < 4; ++stream) {
                    const uint64_t* line = words + begin + stream * quarter + i;
                    __builtin_prefetch(line + 512);
                    for (int j = 0; j < 8; ++j) sums[j] += line[j];
                }
            for (int64_t i = begin + 4 * quarter; i < end; ++i) sums[0] += words[i];
            uint64_t all = 0;
            for (uint64_t s : sums) all += s;
            sink.fetch_add(all, std::memory_order_relaxed);
        });
        const double spent = std::chrono::duration<double>(Clock::now() - start).count();
        if (spent > 0) best = std::max(best, static_cast<double>(bytes) / spent);
    } while (std::chrono::duration<double>(Clock::now() - began).count() < seconds);
    return best;
}

}  // namespace moestro
