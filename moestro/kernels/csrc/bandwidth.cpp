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
            uint64_t sums[8] = {};
            int64_t i = begin;
            for (; i + 32 <= end; i += 32) {
                // About a page ahead, as the expert kernels do: hardware prefetch alone does not cross pages.
                for (int line = 0; line < 4; ++line) __builtin_prefetch(words + i + 512 + 8 * line);
                for (int j = 0; j < 32; ++j) sums[j % 8] += words[i + j];
            }
            for (; i < end; ++i) sums[0] += words[i];
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
