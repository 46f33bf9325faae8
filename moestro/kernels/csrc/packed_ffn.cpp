// Experts and linear maps from packed tiles: which thread rounds and multiplies what when. The arithmetic is in packed_tile.hpp and packed_amx.cpp.
#include <mutex>

#include "level.hpp"
#include "packed.hpp"
#include "wave.hpp"

namespace moestro {
namespace {

constexpr int64_t TASK_BYTES = 384 << 10;        // weights of one task of an expert
constexpr int64_t LINEAR_TASK_BYTES = 256 << 10;
constexpr int64_t ALONE = 1 << 20;               // multiply-adds below which waking a thread costs more than it gives
constexpr int64_t PAIR = 2 * TILE;               // output rows whose activations are rounded together
constexpr int64_t FLOATS = PAIR * BUNDLE;        // products that a thread holds

// Rounded rows, bundle after bundle.
struct Rounded {
    std::vector<int8_t> codes;
    std::vector<float> scales;
    std::vector<int32_t> sums;

    void hold(int64_t rows, int64_t cols) {
        const size_t blocks = static_cast<size_t>(rows * (cols / STEP));
        if (scales.size() >= blocks) return;
        codes.resize(blocks * STEP);
        scales.resize(blocks);
        sums.resize(blocks);
    }
    Bundle bundle(int64_t first, int rows, int64_t blocks) const {
        const int64_t at = first * blocks;
        return {codes.data() + at * STEP, scales.data() + at, sums.data() + at, rows};
    }
    // Rounds part of row `row` of the bundle that begins at row `first` and holds `rows`.
    void put(const PackedLevel& level, const float* x, int64_t first, int row, int rows, int64_t blocks, int64_t block, int64_t count) {
        const int64_t at = first * blocks + block * rows + row;
        level.round(x, count, codes.data() + at * STEP, scales.data() + at, sums.data() + at, rows);
    }
    // Row `row`, a bundle of its own, becomes what the row before it is.
    void repeat(int64_t row, int64_t blocks) {
        const int64_t at = (row - 1) * blocks;
        std::copy_n(codes.begin() + at * STEP, blocks * STEP, codes.begin() + (at + blocks) * STEP);
        std::copy_n(scales.begin() + at, blocks, scales.begin() + at + blocks);
        std::copy_n(sums.begin() + at, blocks, sums.begin() + at + blocks);
    }
    int64_t bytes() const { return static_cast<int64_t>(codes.capacity() + 8 * scales.capacity()); }
};

// body(first, rows) for bundles of about equal size.
template <class Each>
void bundles(int64_t rows, Each&& each) {
    const int64_t count = (rows + BUNDLE - 1) / BUNDLE;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t begin = rows * i / count;
        each(begin, static_cast<int>(rows * (i + 1) / count - begin));
    }
}

struct alignas(64) Buffers {  // one per thread
    float gate[FLOATS];
    float up[FLOATS];
    float hidden[FLOATS];
};

Buffers& own_buffers() {
    thread_local std::unique_ptr<Buffers> own;
    if (!own) own.reset(new Buffers);
    return *own;
}

struct Workspace {
    std::mutex turn;
    Rounded x, hidden;
    std::vector<Segment> segments;
};

Workspace& workspace() {
    static auto* one = new Workspace;
    return *one;
}

// Biases of `count` output rows to what a level's product found for a bundle's rows.
void add(float* found, int rows, int64_t count, const float* bias) {
    for (int64_t o = 0; o < count; o += TILE)
        for (int r = 0; r < rows; ++r)
            for (int64_t i = 0; i < std::min<int64_t>(TILE, count - o); ++i) found[(o * rows + r * TILE) + i] += bias[o + i];
}

// `count` output rows of what a level's product found, to rows of `out`.
void place(const float* found, int rows, int64_t count, char* out, int64_t stride) {
    for (int64_t o = 0; o < count; o += TILE)
        for (int r = 0; r < rows; ++r)
            std::copy_n(found + o * rows + r * TILE, std::min<int64_t>(TILE, count - o), reinterpret_cast<float*>(out + r * stride) + o);
}

// Output rows that a product of a bundle takes at once: one row of activations streams on over many tiles.
int64_t span(int rows) { return FLOATS / rows / PAIR * PAIR; }

// Asks for the beginning of a run of tiles; the kernels ask for the rest.
void touch(const MatrixRef& w, int64_t row) {
    const auto begin = [&](const uint8_t* part, Format format) {
        const uint8_t* at = part + row / TILE * tile_bytes(format, w.cols, w.group);
        for (int i = 0; i < AHEAD; i += 64) __builtin_prefetch(at + i);
    };
    begin(w.data, w.format);
    if (w.third) begin(w.third, Format::tiles_sign);
    if (w.fourth) begin(w.fourth, Format::tiles_sign);
}

int tiles(int64_t count) { return static_cast<int>((count + TILE - 1) / TILE); }

struct Body {
    const FfnCall& call;
    const FfnLevel& level;
    Workspace& space;
    int64_t width_blocks, inner_blocks;

    void up(const Segment& s, int64_t from, int64_t to, int) const {
        const Expert& e = *s.expert;
        Buffers& own = own_buffers();
        if (e.gated) touch(e.gate, from);
        touch(e.up, from);
        bundles(s.end - s.begin, [&](int64_t first, int rows) {
            const Bundle x = space.x.bundle(s.first + first, rows, width_blocks);
            for (int64_t f = from, count; f < to; f += count) {
                count = std::min(span(rows), to - f);
                if (e.gated) {
                    level.packed->product(e.gate, f / TILE, tiles(count), x, own.gate);
                    if (e.gate_bias) add(own.gate, rows, count, e.gate_bias + f);
                }
                level.packed->product(e.up, f / TILE, tiles(count), x, own.up);
                if (e.up_bias) add(own.up, rows, count, e.up_bias + f);
                level.activate(e.gated ? own.gate : nullptr, own.up, static_cast<int>(count * rows), call.activation, call.limit,
                               call.alpha, own.hidden);
                for (int r = 0; r < rows; ++r) {
                    float row[PAIR];
                    for (int64_t o = 0; o < count; o += PAIR) {
                        for (int half = 0; half < 2; ++half)
                            std::copy_n(own.hidden + ((o + half * TILE) * rows + r * TILE), TILE, row + half * TILE);
                        space.hidden.put(*level.packed, row, s.first + first, r, rows, inner_blocks, (f + o) / STEP, 1);
                    }
                }
            }
        });
    }

    void down(const Segment& s, int64_t from, int64_t to, int) const {
        const Expert& e = *s.expert;
        float* found = own_buffers().up;
        touch(e.down, from);
        bundles(s.end - s.begin, [&](int64_t first, int rows) {
            for (int64_t d = from, count; d < to; d += count) {
                count = std::min(span(rows), to - d);
                level.packed->product(e.down, d / TILE, tiles(count), space.hidden.bundle(s.first + first, rows, inner_blocks), found);
                if (e.down_bias) add(found, rows, count, e.down_bias + d);
                place(found, rows, count, reinterpret_cast<char*>(call.out) + (s.begin + first) * call.out_stride + d * 4, call.out_stride);
            }
        });
    }
};

struct Place {  // where a row of a segment goes
    int64_t first;  // row at which its bundle begins
    int row, rows;
};

void run_wave(const FfnCall& call, Workspace& space, int64_t rows) {
    const Expert& shape = *space.segments.front().expert;
    const int64_t width = shape.up.cols, inner = shape.up.rows;
    const FfnLevel& level = current();
    space.x.hold(rows, width);
    space.hidden.hold(rows, inner);
    std::vector<Place> places(static_cast<size_t>(rows));
    for (Segment& s : space.segments) {
        bundles(s.end - s.begin, [&](int64_t first, int count) {
            for (int r = 0; r < count; ++r) places[s.first + first + r] = {s.first + first, r, count};
        });
        s.up = {inner, rows_per_task(inner, PAIR, (s.expert->gated ? 2 : 1) * row_bytes_in_tiles(s.expert->up), call.threads, TASK_BYTES)};
        s.down = {width, rows_per_task(width, TILE, row_bytes_in_tiles(s.expert->down), call.threads, TASK_BYTES)};
    }
    const int64_t begin = space.segments.front().begin;  // a wave's pairs follow one another
    const int64_t blocks = width / STEP;
    parallel(rows < 64 ? 1 : call.threads, rows, 16, [&](int64_t from, int64_t to) {
        std::vector<float> scaled(call.input_weight ? static_cast<size_t>(width) : 0);
        for (int64_t i = from; i < to; ++i) {
            const int64_t n = begin + i;
            if (i > from && !call.input_weight && call.rows[n] == call.rows[n - 1] && places[i].rows == 1 && places[i - 1].rows == 1) {
                space.x.repeat(i, blocks);  // one token for several experts
                continue;
            }
            const auto* x = reinterpret_cast<const float*>(reinterpret_cast<const char*>(call.x) + call.rows[n] * call.x_stride);
            if (call.input_weight) {
                for (int64_t d = 0; d < width; ++d) scaled[d] = x[d] * call.input_weight[n];
                x = scaled.data();
            }
            space.x.put(*level.packed, x, places[i].first, places[i].row, places[i].rows, blocks, 0, blocks);
        }
    });
    Body body{call, level, space, blocks, inner / STEP};
    Wave<Body>(space.segments, body, call.threads);
}

}  // namespace

void packed_ffn(const FfnCall& call) {
    Workspace& space = workspace();
    std::lock_guard<std::mutex> turn(space.turn);
    const MatrixRef& up = call.experts[0]->up;
    const int64_t bytes = std::max<int64_t>(1, (up.rows + up.cols) / STEP * (STEP + 8));
    in_waves(call, std::max<int64_t>(1, WAVE_BYTES / bytes), space.segments, [&](int64_t rows) { run_wave(call, space, rows); });
}

int64_t packed_scratch_bytes() {
    Workspace& space = workspace();
    std::lock_guard<std::mutex> turn(space.turn);
    return space.x.bytes() + space.hidden.bytes();
}

void packed_linears(const float* x, int64_t x_stride, int64_t rows, const std::vector<LinearJob>& jobs, int threads) {
    thread_local Rounded rounded;
    const PackedLevel& level = *current().packed;
    const int64_t cols = jobs.front().weight->cols, blocks = cols / STEP;
    int64_t outputs = 0;
    for (auto& job : jobs) outputs += job.weight->rows;
    threads = outputs * cols * rows < ALONE ? 1 : threads_for(threads);
    Rounded& space = rounded;  // the caller's, for all threads
    space.hold(rows, cols);
    std::vector<std::pair<int64_t, int>> all;
    bundles(rows, [&](int64_t first, int count) { all.emplace_back(first, count); });
    for (auto& [first, count] : all)
        parallel(count < 32 ? 1 : threads, count, 8, [&, first = first, count = count](int64_t from, int64_t to) {
            for (int64_t r = from; r < to; ++r) {
                const auto* row = reinterpret_cast<const float*>(reinterpret_cast<const char*>(x) + (first + r) * x_stride);
                space.put(level, row, first, static_cast<int>(r), count, blocks, 0, blocks);
            }
        });
    std::vector<int64_t> starts, steps;  // number of each job's first task; output rows of its tasks
    int64_t total = 0;
    for (auto& job : jobs) {
        const int64_t bytes = row_bytes_in_tiles(*job.weight);
        int64_t step = std::max<int64_t>(1, LINEAR_TASK_BYTES / (bytes * TILE));
        step = std::min(step, std::max<int64_t>(1, outputs / TILE / (4 * threads))) * TILE;
        starts.push_back(total);
        steps.push_back(step);
        total += (job.weight->rows + step - 1) / step;
    }
    parallel(threads, total, 1, [&](int64_t begin, int64_t end) {
        float* found = own_buffers().up;
        for (int64_t task = begin; task < end; ++task) {
            const size_t j = static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), task) - starts.begin()) - 1;
            const LinearJob& job = jobs[j];
            const int64_t from = (task - starts[j]) * steps[j], to = std::min(from + steps[j], job.weight->rows);
            touch(*job.weight, from);
            for (auto& [first, rows] : all)
                for (int64_t o = from, some; o < to; o += some) {
                    some = std::min(span(rows), to - o);
                    level.product(*job.weight, o / TILE, tiles(some), space.bundle(first, rows, blocks), found);
                    if (job.bias) add(found, rows, some, job.bias + o);
                    place(found, rows, some, reinterpret_cast<char*>(job.out) + first * job.out_stride + o * 4, job.out_stride);
                }
        }
    });
}

}  // namespace moestro
