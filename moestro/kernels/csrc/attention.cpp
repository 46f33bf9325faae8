// Attention: which thread takes which queries and keys, and how the spans' partial softmaxes are merged.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "level.hpp"
#include "pool.hpp"
#include "trunk.hpp"

namespace moestro {
namespace {

constexpr int QUERIES = 48;         // query rows that share one pass over the keys
constexpr int64_t ALONE = 1 << 18;  // multiply-adds below which waking a thread costs more than it gives

struct Partial {  // running softmax of some rows: largest score, total, weighted values
    float *top, *total, *sums;
};

struct Task {
    int64_t head;         // of keys and values
    int64_t row, rows;    // rows of a head: token * group + member
    int64_t begin, end;   // keys that any of the rows sees
};

struct Work {
    const AttendCall& call;
    const FfnLevel& level;
    int64_t group, padded;  // queries per shared head; floats per row of weighted values

    int64_t length(int64_t row) const { return call.lengths[row / group]; }
    int64_t first(int64_t row) const { return call.window > 0 ? std::max<int64_t>(0, length(row) - call.window) : 0; }
    int64_t floats(int64_t rows) const { return rows * (padded + 2); }
    Partial partial(float* place, int64_t rows) const { return {place, place + rows, place + 2 * rows}; }

    // One span of keys for one task.
    void span(const Task& task, int64_t at, Partial out) const {
        thread_local std::unique_ptr<float[]> kept;
        if (!kept) kept.reset(new float[QUERIES * SPAN]);
        float* scores = kept.get();
        Scratch& scratch = own_scratch();
        const int rows = static_cast<int>(task.rows);
        const float* q[QUERIES];
        int begin[QUERIES], end[QUERIES];
        for (int r = 0; r < rows; ++r) {
            const int64_t row = task.row + r;
            q[r] = call.q.at(row / group, task.head * group + row % group);
            begin[r] = static_cast<int>(std::max<int64_t>(first(row) - at, 0));
            end[r] = static_cast<int>(std::min<int64_t>(length(row) - at, SPAN));
        }
        const Cache& keys = call.keys;
        const MatrixRef matrix{keys.format, keys.data + task.head * keys.head_stride, keys.stride, keys.positions, keys.width,
                               nullptr,     0,                                        false,       0};
        const int64_t from = std::max(task.begin, at), to = std::min(task.end, at + SPAN);
        const int64_t line_step = 64, row_bytes = keys.width * (keys.format == Format::f32 ? 4 : 2);
        for (int64_t k = from; k < to; k += TILE) {
            const int count = static_cast<int>(std::min<int64_t>(TILE, to - k));
            for (int64_t next = k + TILE; next < std::min(k + 2 * TILE, to); ++next)
                for (int64_t byte = 0; byte < row_bytes; byte += line_step)
                    __builtin_prefetch(matrix.data + next * keys.stride + byte);
            level.product(matrix, k, count, q, rows, scratch.up, scratch);
            for (int r = 0; r < rows; ++r) std::copy_n(scratch.up + r * TILE, count, scores + r * SPAN + (k - at));
        }
        for (int r = 0; r < rows; ++r) {
            out.top[r] = -INFINITY;
            out.total[r] = 0;
            if (begin[r] < end[r])
                out.total[r] = level.soften(scores + r * SPAN, begin[r], end[r], call.scale, call.softcap, out.top + r);
        }
        std::fill_n(out.sums, rows * padded, 0.0f);
        Cache values = call.values;
        values.data += task.head * values.head_stride;
        level.blend(values, at, scores, begin, end, rows, out.sums, padded, scratch);
    }

    void merge(const Task& task, Partial into, Partial next, int64_t at) const {
        for (int64_t r = 0; r < task.rows; ++r) {
            if (first(task.row + r) >= at + SPAN || length(task.row + r) <= at) continue;  // it sees none of these keys
            float *a = into.sums + r * padded, *b = next.sums + r * padded;
            const float top = std::max(into.top[r], next.top[r]);
            // Nothing seen before: minus infinity less minus infinity would not do.
            const float was = into.top[r] == -INFINITY ? 0.0f : std::exp(into.top[r] - top), is = std::exp(next.top[r] - top);
            for (int64_t v = 0; v < padded; ++v) a[v] = a[v] * was + b[v] * is;
            into.total[r] = into.total[r] * was + next.total[r] * is;
            into.top[r] = top;
        }
    }

    void finish(const Task& task, Partial found) const {
        for (int64_t r = 0; r < task.rows; ++r) {
            const int64_t row = task.row + r, head = task.head * group + row % group;
            float* out = call.out.at(row / group, head);
            if (first(row) >= length(row)) {
                std::fill_n(out, call.values.width, 0.0f);
                continue;
            }
            float by = 1.0f, total = found.total[r];
            if (call.sinks) {
                const float top = std::max(found.top[r], call.sinks[head]);
                by = std::exp(found.top[r] - top);
                total = total * by + std::exp(call.sinks[head] - top);
            }
            const float* sums = found.sums + r * padded;
            for (int64_t v = 0; v < call.values.width; ++v) out[v] = sums[v] * by / total;
        }
    }

    void clear(const Task& task, Partial p) const {
        std::fill_n(p.top, task.rows, -INFINITY);
        std::fill_n(p.total, task.rows, 0.0f);
        std::fill_n(p.sums, task.rows * padded, 0.0f);
    }
};

float* own_floats(size_t count) {
    thread_local std::vector<float> own;
    if (own.size() < count) own.resize(count);
    return own.data();
}

}  // namespace

int64_t attend_work(const AttendCall& call) {
    int64_t seen = 0;
    for (int64_t t = 0; t < call.tokens; ++t) seen += call.window > 0 ? std::min(call.lengths[t], call.window) : call.lengths[t];
    return seen * call.heads * (call.keys.width + call.values.width);
}

void attend(const AttendCall& call) {
    const Work work{call, current(), call.heads / call.shared, (call.values.width + PANEL - 1) / PANEL * PANEL};
    const int threads = attend_work(call) < ALONE ? 1 : threads_for(call.threads);
    std::vector<Task> tasks;
    std::vector<int64_t> spans{0};  // number of each task's first span
    for (int64_t row = 0; row < call.tokens * work.group; row += QUERIES)
        for (int64_t head = 0; head < call.shared; ++head) {
            Task task{head, row, std::min<int64_t>(QUERIES, call.tokens * work.group - row), call.keys.positions, 0};
            for (int64_t r = row; r < row + task.rows; ++r) {
                if (work.first(r) >= work.length(r)) continue;
                task.begin = std::min(task.begin, work.first(r));
                task.end = std::max(task.end, work.length(r));
            }
            const bool any = task.begin < task.end;
            tasks.push_back(task);
            spans.push_back(spans.back() + (any ? (task.end - 1) / SPAN - task.begin / SPAN + 1 : 0));
        }
    const int64_t count = static_cast<int64_t>(tasks.size());
    const auto floats = static_cast<size_t>(work.floats(std::min<int64_t>(QUERIES, call.tokens * work.group)));
    if (threads == 1 || count >= 4 * threads) {  // a task is one thread's
        parallel(threads, count, 1, [&](int64_t from, int64_t to) {
            float* place = own_floats(2 * floats);
            for (int64_t i = from; i < to; ++i) {
                const Task& task = tasks[i];
                const Partial found = work.partial(place, task.rows), next = work.partial(place + floats, task.rows);
                work.clear(task, found);
                for (int64_t at = task.begin / SPAN * SPAN; at < task.end; at += SPAN) {
                    work.span(task, at, next);
                    work.merge(task, found, next, at);
                }
                work.finish(task, found);
            }
        });
        return;
    }
    // Few queries and heads: the spans are shared out, then merged in the same order.
    float* kept = own_floats((spans.back() + 1) * floats);
    parallel(threads, spans.back(), 1, [&](int64_t from, int64_t to) {
        for (int64_t s = from; s < to; ++s) {
            const auto i = static_cast<size_t>(std::upper_bound(spans.begin(), spans.end(), s) - spans.begin()) - 1;
            work.span(tasks[i], tasks[i].begin / SPAN * SPAN + (s - spans[i]) * SPAN,
                      work.partial(&kept[s * floats], tasks[i].rows));
        }
    });
    const Partial found = work.partial(&kept[spans.back() * floats], tasks.front().rows);
    for (int64_t i = 0; i < count; ++i) {
        work.clear(tasks[i], found);
        for (int64_t s = spans[i]; s < spans[i + 1]; ++s)
            work.merge(tasks[i], found, work.partial(&kept[s * floats], tasks[i].rows),
                       tasks[i].begin / SPAN * SPAN + (s - spans[i]) * SPAN);
        work.finish(tasks[i], found);
    }
}

}  // namespace moestro
