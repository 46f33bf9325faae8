// Linear maps: which thread computes which rows of which matrix. The arithmetic is in ffn_tile.hpp.
#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#if defined(__linux__)
#include <sched.h>
#endif
#include <thread>

#include "level.hpp"
#include "packed.hpp"
#include "pool.hpp"
#include "trunk.hpp"

namespace moestro {
namespace {

constexpr int64_t TASK_BYTES = 512 << 10;  // weights of one task: shorter runs lose memory rate at their seams
constexpr int64_t ALONE = 1 << 17;  // multiply-adds below which waking a thread costs more than it gives

int64_t row_bytes(const MatrixRef& w) {
    static const int bits[] = {32, 16, 16, 8, 4, 4, 4};
    return std::max<int64_t>(1, w.cols * bits[static_cast<int>(w.format)] / 8);
}

struct Work {
    const std::vector<LinearJob>& jobs;
    const FfnLevel& level;
    const std::vector<const float*>& x;
    std::vector<int64_t> starts, steps;  // number of each job's first task; output rows of its tasks

    void run(int64_t task) const {
        const size_t j = static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), task) - starts.begin()) - 1;
        const LinearJob& job = jobs[j];
        Scratch& scratch = own_scratch();
        const int64_t from = (task - starts[j]) * steps[j], to = std::min(from + steps[j], job.weight->rows);
        const int64_t rows = static_cast<int64_t>(x.size());
        for (int64_t n = 0; n < rows; n += ROWS) {
            const int some = static_cast<int>(std::min<int64_t>(ROWS, rows - n));
            for (int64_t o = from; o < to; o += TILE) {
                const int count = static_cast<int>(std::min<int64_t>(TILE, to - o));
                level.product(*job.weight, o, count, &x[n], some, scratch.up, scratch);
                for (int r = 0; r < some; ++r) {
                    auto* out = reinterpret_cast<float*>(reinterpret_cast<char*>(job.out) + (n + r) * job.out_stride) + o;
                    const float* found = scratch.up + r * TILE;
                    if (job.bias)
                        for (int i = 0; i < count; ++i) out[i] = found[i] + job.bias[o + i];
                    else
                        std::copy_n(found, count, out);
                }
            }
        }
    }
};

}  // namespace

Scratch& own_scratch() {
    thread_local std::unique_ptr<Scratch> own;
    if (!own) own.reset(new Scratch);
    return *own;
}

int threads_for(int wanted) {
    if (wanted > 0) return wanted;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void linears(const float* x, int64_t x_stride, int64_t rows, const std::vector<LinearJob>& jobs, int threads) {
    if (rows == 0 || jobs.empty()) return;
    const bool packed = in_tiles(jobs.front().weight->format);
    for (auto& job : jobs)
        if (in_tiles(job.weight->format) != packed) throw std::invalid_argument("packed matrices and matrices in rows cannot share a call");
    if (packed) return packed_linears(x, x_stride, rows, jobs, threads);
    std::vector<const float*> at(static_cast<size_t>(rows));
    for (int64_t r = 0; r < rows; ++r)
        at[r] = reinterpret_cast<const float*>(reinterpret_cast<const char*>(x) + r * x_stride);
    int64_t outputs = 0, sums = 0;
    for (auto& job : jobs) {
        outputs += job.weight->rows;
        sums += job.weight->rows * job.weight->cols * rows;
    }
    threads = sums < ALONE ? 1 : threads_for(threads);
    Work work{jobs, current(), at, {}, {}};
    int64_t total = 0;
    for (auto& job : jobs) {
        // Enough bytes to be worth handing out, few enough that all threads share the call.
        int64_t step = std::max<int64_t>(1, TASK_BYTES / (row_bytes(*job.weight) * TILE));
        step = std::min(step, std::max<int64_t>(1, outputs / TILE / (4 * threads))) * TILE;
        work.starts.push_back(total);
        work.steps.push_back(step);
        total += (job.weight->rows + step - 1) / step;
    }
    parallel(threads, total, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) work.run(task);
    });
}

}  // namespace moestro
