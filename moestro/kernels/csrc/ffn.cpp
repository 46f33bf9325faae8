// The scheduler: which thread computes which tile when. The arithmetic is in ffn_tile.hpp.
#include "ffn.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>

#include "level.hpp"
#include "pool.hpp"

namespace moestro {
namespace {

constexpr int64_t HIDDEN_BYTES = 16 << 20;  // bound of the memory between the two halves; longer calls go in waves
constexpr int64_t TASK_BYTES = 128 << 10;   // weights of one task when there are few rows

struct Segment {  // rows of one expert within a wave
    const Expert* expert;
    int64_t begin, end;     // pairs
    int64_t first;          // row in the wave's buffers
    int64_t up_tasks = 0, up_step = 0;      // first half: gate, up, activation
    int64_t down_tasks = 0, down_step = 0;  // second half
    int64_t up_start = 0, down_start = 0;   // number of the first task
};

struct Workspace {
    std::mutex turn;
    std::vector<float> hidden, scaled;
    std::vector<const float*> x, h;
    std::vector<Segment> segments;
    std::unique_ptr<std::atomic<int64_t>[]> left;
    size_t left_size = 0;
    std::vector<std::unique_ptr<Scratch>> scratch;
};

Workspace& workspace() {
    static auto* one = new Workspace;
    return *one;
}

int64_t row_bytes(const MatrixRef& w) {
    static const int bits[] = {32, 16, 16, 8, 4, 4};
    return std::max<int64_t>(1, w.cols * bits[static_cast<int>(w.format)] / 8);
}

// Output rows per task: enough bytes to be worth handing out, few enough that all threads share even a single expert.
int64_t step_for(int64_t outputs, int64_t bytes_per_output, int threads) {
    const int64_t tiles = (outputs + TILE - 1) / TILE;
    int64_t step = std::max<int64_t>(1, TASK_BYTES / (bytes_per_output * TILE));
    step = std::min(step, std::max<int64_t>(1, tiles / (4 * threads)));
    return step * TILE;
}

struct Wave {
    const FfnCall& call;
    const FfnLevel& level;
    Workspace& space;
    int64_t up_total, down_total;
    std::atomic<int64_t> next{0};

    void work(int worker) {
        Scratch& scratch = *space.scratch[worker];
        for (;;) {
            const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
            if (task >= up_total + down_total) return;
            if (task < up_total)
                up(task, scratch);
            else
                down(task - up_total, scratch);
        }
    }

    template <int64_t Segment::*start>
    size_t segment_of(int64_t task) const {
        auto& all = space.segments;
        auto after = std::upper_bound(all.begin(), all.end(), task, [](int64_t t, const Segment& s) { return t < s.*start; });
        return static_cast<size_t>(after - all.begin()) - 1;
    }

    void up(int64_t task, Scratch& scratch) {
        const size_t index = segment_of<&Segment::up_start>(task);
        const Segment& s = space.segments[index];
        const Expert& e = *s.expert;
        const int64_t inner = e.up.rows;
        const int64_t from = (task - s.up_start) * s.up_step, to = std::min(from + s.up_step, inner);
        for (int64_t f = from; f < to; f += TILE) {
            const int count = static_cast<int>(std::min<int64_t>(TILE, to - f));
            for (int64_t n = s.begin; n < s.end; n += ROWS) {
                const int rows = static_cast<int>(std::min<int64_t>(ROWS, s.end - n));
                const int64_t at = s.first + (n - s.begin);
                if (e.gated) {
                    level.product(e.gate, f, count, &space.x[at], rows, scratch.gate, scratch);
                    if (e.gate_bias) add(scratch.gate, rows, count, e.gate_bias + f);
                }
                level.product(e.up, f, count, &space.x[at], rows, scratch.up, scratch);
                if (e.up_bias) add(scratch.up, rows, count, e.up_bias + f);
                for (int r = 0; r < rows; ++r)
                    level.activate(e.gated ? scratch.gate + r * TILE : nullptr, scratch.up + r * TILE, count, call.activation,
                                   call.limit, call.alpha, &space.hidden[(at + r) * inner + f]);
            }
        }
        space.left[index].fetch_sub(1, std::memory_order_release);
    }

    void down(int64_t task, Scratch& scratch) {
        const size_t index = segment_of<&Segment::down_start>(task);
        const Segment& s = space.segments[index];
        const Expert& e = *s.expert;
        // All first halves have been handed out before; at most the last few are still being computed.
        for (int tries = 0; space.left[index].load(std::memory_order_acquire) != 0; ++tries)
            if (tries > 2000) std::this_thread::yield();
        const int64_t from = (task - s.down_start) * s.down_step, to = std::min(from + s.down_step, e.down.rows);
        for (int64_t d = from; d < to; d += TILE) {
            const int count = static_cast<int>(std::min<int64_t>(TILE, to - d));
            for (int64_t n = s.begin; n < s.end; n += ROWS) {
                const int rows = static_cast<int>(std::min<int64_t>(ROWS, s.end - n));
                level.product(e.down, d, count, &space.h[s.first + (n - s.begin)], rows, scratch.up, scratch);
                if (e.down_bias) add(scratch.up, rows, count, e.down_bias + d);
                for (int r = 0; r < rows; ++r) {
                    auto* out = reinterpret_cast<float*>(reinterpret_cast<char*>(call.out) + (n + r) * call.out_stride) + d;
                    std::copy_n(scratch.up + r * TILE, count, out);
                }
            }
        }
    }

    static void add(float* values, int rows, int count, const float* bias) {
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < count; ++i) values[r * TILE + i] += bias[i];
    }
};

void run_wave(const FfnCall& call, Workspace& space, int64_t rows) {
    const Expert& shape = *space.segments.front().expert;
    const int64_t width = shape.up.cols, inner = shape.up.rows;
    space.hidden.resize(std::max<size_t>(space.hidden.size(), rows * inner));
    space.x.resize(rows);
    space.h.resize(rows);
    if (call.input_weight) space.scaled.resize(std::max<size_t>(space.scaled.size(), rows * width));
    if (space.left_size < space.segments.size()) {
        space.left.reset(new std::atomic<int64_t>[space.segments.size()]);
        space.left_size = space.segments.size();
    }
    while (static_cast<int>(space.scratch.size()) < call.threads) space.scratch.emplace_back(new Scratch);

    Wave wave{call, current(), space, 0, 0};
    for (size_t i = 0; i < space.segments.size(); ++i) {
        Segment& s = space.segments[i];
        for (int64_t n = s.begin; n < s.end; ++n) {
            const int64_t at = s.first + (n - s.begin);
            const auto* x = reinterpret_cast<const float*>(reinterpret_cast<const char*>(call.x) + call.rows[n] * call.x_stride);
            if (call.input_weight) {
                float* to = &space.scaled[at * width];
                for (int64_t d = 0; d < width; ++d) to[d] = x[d] * call.input_weight[n];
                x = to;
            }
            space.x[at] = x;
            space.h[at] = &space.hidden[at * inner];
        }
        s.up_step = step_for(inner, row_bytes(s.expert->up) * (s.expert->gated ? 2 : 1), call.threads);
        s.down_step = step_for(width, row_bytes(s.expert->down), call.threads);
        s.up_tasks = (inner + s.up_step - 1) / s.up_step;
        s.down_tasks = (width + s.down_step - 1) / s.down_step;
        s.up_start = wave.up_total;
        s.down_start = wave.down_total;
        wave.up_total += s.up_tasks;
        wave.down_total += s.down_tasks;
        space.left[i].store(s.up_tasks, std::memory_order_relaxed);
    }
    run_on_pool(call.threads, [](void* raw, int worker) { static_cast<Wave*>(raw)->work(worker); }, &wave);
}

}  // namespace

void grouped_ffn(const FfnCall& call) {
    Workspace& space = workspace();
    std::lock_guard<std::mutex> turn(space.turn);
    space.segments.clear();
    int64_t used = 0;
    for (size_t g = 0; g < call.experts.size(); ++g) {
        const Expert* expert = call.experts[g];
        const int64_t widest = std::max(expert->up.rows, call.input_weight ? expert->up.cols : 0);
        const int64_t capacity = std::max<int64_t>(1, HIDDEN_BYTES / (4 * std::max<int64_t>(1, widest)));
        for (int64_t n = call.starts[g]; n < call.starts[g + 1];) {
            if (used >= capacity) {
                run_wave(call, space, used);
                space.segments.clear();
                used = 0;
            }
            const int64_t end = std::min(call.starts[g + 1], n + capacity - used);
            space.segments.push_back({expert, n, end, used});
            used += end - n;
            n = end;
        }
    }
    if (used) run_wave(call, space, used);
}

int64_t ffn_scratch_bytes() {
    Workspace& space = workspace();
    std::lock_guard<std::mutex> turn(space.turn);
    return static_cast<int64_t>((space.hidden.capacity() + space.scaled.capacity()) * sizeof(float) +
                                space.scratch.size() * sizeof(Scratch));
}

}  // namespace moestro
