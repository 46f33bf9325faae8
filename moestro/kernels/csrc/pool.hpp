// One pool of threads for all kernels.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace moestro {

// Run job(context, worker) on the caller (worker 0) and on up to threads - 1 others; returns when all have ended.
// Concurrent calls take turns. A worker that the system does not schedule in time is not waited for.
void run_on_pool(int threads, void (*job)(void*, int), void* context);

// body(begin, end) over 0..count in chunks of `grain`, handed out as threads become free.
template <class Body>
void parallel(int threads, int64_t count, int64_t grain, Body&& body) {
    grain = std::max<int64_t>(grain, 1);
    const int64_t chunks = (count + grain - 1) / grain;
    if (threads <= 1 || chunks <= 1) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
    struct Context {
        Body& body;
        std::atomic<int64_t> next;
        int64_t count, grain;
    } context{body, {0}, count, grain};
    run_on_pool(
        static_cast<int>(std::min<int64_t>(threads, chunks)),
        [](void* raw, int) {
            auto& c = *static_cast<Context*>(raw);
            for (;;) {
                const int64_t begin = c.next.fetch_add(c.grain, std::memory_order_relaxed);
                if (begin >= c.count) return;
                c.body(begin, std::min(begin + c.grain, c.count));
            }
        },
        &context);
}

}  // namespace moestro
