// The scheduler: which thread computes which tile when. The arithmetic is in ffn_tile.hpp.
#include "ffn.hpp"

#include <memory>
#include <mutex>

#include "level.hpp"
#include "packed.hpp"
#include "wave.hpp"

namespace moestro {
namespace {

constexpr int64_t TASK_BYTES = 128 << 10;  // weights of one task when there are few rows

struct Workspace {
    std::mutex turn;
    std::vector<float> hidden, scaled;
    std::vector<const float*> x, h;
    std::vector<Segment> segments;
    std::vector<std::unique_ptr<Scratch>> scratch;
};

Workspace& workspace() {
    static auto* one = new Workspace;
    return *one;
}

int64_t row_bytes(const MatrixRef& w) {
    static const int bits[] = {32, 16, 16, 8, 4, 4, 4};
    return std::max<int64_t>(1, w.cols * bits[static_cast<int>(w.format)] / 8);
}

struct Body {
    const FfnCall& call;
    const FfnLevel& level;
    Workspace& space;

    void up(const Segment& s, int64_t from, int64_t to, int worker) const {
        Scratch& scratch = *space.scratch[worker];
        const Expert& e = *s.expert;
        const int64_t inner = e.up.rows;
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
    }

    void down(const Segment& s, int64_t from, int64_t to, int worker) const {
        Scratch& scratch = *space.scratch[worker];
        const Expert& e = *s.expert;
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
    while (static_cast<int>(space.scratch.size()) < call.threads) space.scratch.emplace_back(new Scratch);

    for (Segment& s : space.segments) {
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
        s.up = {inner, rows_per_task(inner, TILE, row_bytes(s.expert->up) * (s.expert->gated ? 2 : 1), call.threads, TASK_BYTES)};
        s.down = {width, rows_per_task(width, TILE, row_bytes(s.expert->down), call.threads, TASK_BYTES)};
    }
    Body body{call, current(), space};
    Wave<Body>(space.segments, body, call.threads);
}

}  // namespace

void grouped_ffn(const FfnCall& call) {
    if (call.experts.empty()) return;
    if (in_tiles(call.experts[0]->up.format)) return packed_ffn(call);
    Workspace& space = workspace();
    std::lock_guard<std::mutex> turn(space.turn);
    const MatrixRef& up = call.experts[0]->up;
    const int64_t widest = std::max<int64_t>({1, up.rows, call.input_weight ? up.cols : 0});
    in_waves(call, std::max<int64_t>(1, WAVE_BYTES / (4 * widest)), space.segments,
             [&](int64_t rows) { run_wave(call, space, rows); });
}

int64_t ffn_scratch_bytes() {
    Workspace& space = workspace();
    std::lock_guard<std::mutex> turn(space.turn);
    return packed_scratch_bytes() +
           static_cast<int64_t>((space.hidden.capacity() + space.scaled.capacity()) * sizeof(float) +
                                space.scratch.size() * sizeof(Scratch));
}

}  // namespace moestro
