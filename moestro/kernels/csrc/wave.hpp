// Two halves of many experts' work, handed out as tasks while threads become free: all first halves, then all second halves. A second
// half waits for its expert's first ones, which have all been handed out before.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "ffn.hpp"
#include "pool.hpp"

namespace moestro {

constexpr int64_t WAVE_BYTES = 16 << 20;  // bound of the memory between the two halves; longer calls go in waves

struct Share {  // of an expert's output rows
    int64_t rows = 0, step = 0, start = 0;  // rows of a task; number of the first task
    int64_t tasks() const { return (rows + step - 1) / step; }
};

struct Segment {  // rows of one expert within a wave
    const Expert* expert;
    int64_t begin, end;  // pairs
    int64_t first;       // row in the wave's buffers
    Share up{}, down{};
};

// Output rows per task, a multiple of `unit`: enough bytes to be worth handing out, few enough that all threads share even one expert.
inline int64_t rows_per_task(int64_t rows, int64_t unit, int64_t bytes_per_row, int threads, int64_t task_bytes) {
    const int64_t units = (rows + unit - 1) / unit;
    const int64_t step = std::max<int64_t>(1, task_bytes / (bytes_per_row * unit));
    return std::min(step, std::max<int64_t>(1, units / (4 * threads))) * unit;
}

// Splits a call's pairs into waves of at most `capacity` rows; run(segments, rows) computes one.
template <class Run>
void in_waves(const FfnCall& call, int64_t capacity, std::vector<Segment>& segments, Run&& run) {
    segments.clear();
    int64_t used = 0;
    for (size_t g = 0; g < call.experts.size(); ++g)
        for (int64_t n = call.starts[g]; n < call.starts[g + 1];) {
            if (used >= capacity) {
                run(used);
                segments.clear();
                used = 0;
            }
            const int64_t end = std::min(call.starts[g + 1], n + capacity - used);
            segments.push_back({call.experts[g], n, end, used});
            used += end - n;
            n = end;
        }
    if (used) run(used);
}

// body.up(segment, from, to, worker) computes rows of a first half, body.down likewise of a second half.
template <class Body>
class Wave {
public:
    Wave(std::vector<Segment>& segments, Body& body, int threads) : segments_(segments), body_(body), left_(new std::atomic<int64_t>[segments.size()]) {
        for (size_t i = 0; i < segments.size(); ++i) {
            segments[i].up.start = ups_;
            segments[i].down.start = downs_;
            ups_ += segments[i].up.tasks();
            downs_ += segments[i].down.tasks();
            left_[i].store(segments[i].up.tasks(), std::memory_order_relaxed);
        }
        run_on_pool(threads, [](void* raw, int worker) { static_cast<Wave*>(raw)->work(worker); }, this);
    }

private:
    void work(int worker) {
        for (;;) {
            const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
            if (task >= ups_ + downs_) return;
            if (task < ups_) {
                const size_t i = holder<&Segment::up>(task);
                const Share& share = segments_[i].up;
                const int64_t from = (task - share.start) * share.step;
                body_.up(segments_[i], from, std::min(from + share.step, share.rows), worker);
                left_[i].fetch_sub(1, std::memory_order_release);
            } else {
                const size_t i = holder<&Segment::down>(task - ups_);
                const Share& share = segments_[i].down;
                for (int tries = 0; left_[i].load(std::memory_order_acquire) != 0; ++tries)
                    if (tries > 2000) std::this_thread::yield();
                const int64_t from = (task - ups_ - share.start) * share.step;
                body_.down(segments_[i], from, std::min(from + share.step, share.rows), worker);
            }
        }
    }

    template <Share Segment::*share>
    size_t holder(int64_t task) const {
        auto after = std::upper_bound(segments_.begin(), segments_.end(), task,
                                      [](int64_t t, const Segment& s) { return t < (s.*share).start; });
        return static_cast<size_t>(after - segments_.begin()) - 1;
    }

    std::vector<Segment>& segments_;
    Body& body_;
    std::unique_ptr<std::atomic<int64_t>[]> left_;
    int64_t ups_ = 0, downs_ = 0;
    std::atomic<int64_t> next_{0};
};

}  // namespace moestro
