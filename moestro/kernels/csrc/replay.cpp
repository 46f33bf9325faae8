// LRU, LFU and Belady order the experts whatever the capacity, so what a small cache holds a larger one holds too (Mattson et al.
// 1970): one pass keeps a stack cut into one segment per budget and counts them all. ARC, and demands that need waves, are simulated
// budget by budget as the slot table does.
#include "replay.hpp"

#include <algorithm>
#include <limits>
#include <utility>

namespace moestro {
namespace {

// The demands that one pool of slots serves: all, or those of one layer.
struct Pool {
    int64_t from, stride;
};

// Doubly linked lists over the keys, oldest first; a key is in one list at most.
class Lists {
public:
    Lists(int64_t keys, int64_t lists) : next_(keys + lists), prev_(keys + lists), size_(lists, 0), keys_(static_cast<int32_t>(keys)) {
        for (int32_t i = keys_; i < static_cast<int32_t>(next_.size()); ++i) next_[i] = prev_[i] = i;
    }
    int64_t size(int64_t list) const { return size_[list]; }
    int32_t oldest(int64_t list) const { return next_[keys_ + list]; }
    int32_t after(int32_t key) const { return next_[key]; }
    bool ends(int32_t key) const { return key >= keys_; }
    void add(int64_t list, int32_t key) {
        const int32_t end = keys_ + static_cast<int32_t>(list), last = prev_[end];
        next_[last] = prev_[end] = key;
        prev_[key] = last, next_[key] = end;
        ++size_[list];
    }
    void remove(int64_t list, int32_t key) {
        next_[prev_[key]] = next_[key], prev_[next_[key]] = prev_[key];
        --size_[list];
    }

private:
    std::vector<int32_t> next_, prev_;
    std::vector<int64_t> size_;
    int32_t keys_;
};

// Keys with scores in segments; the least leaves first. Each block of 16 knows its least, so a search reads a few numbers only.
class Scores {
public:
    Scores(int64_t keys, int64_t segments) : segment_(segments), place_(keys) {}
    int64_t size(int64_t s) const { return segment_[s].size; }
    void add(int64_t s, int32_t key, double score) {
        Segment& to = segment_[s];
        const int64_t at = to.size++;
        if (at % BLOCK == 0) {
            to.score.resize(at + BLOCK, NONE), to.key.resize(at + BLOCK);
            to.least.resize(at / BLOCK + 1, NONE);
        }
        to.score[at] = score, to.key[at] = key, place_[key] = static_cast<int32_t>(at);
        to.least[at / BLOCK] = std::min(to.least[at / BLOCK], score);
    }
    void remove(int64_t s, int32_t key) {
        Segment& from = segment_[s];
        const int64_t at = place_[key], last = --from.size;
        const double score = from.score[at], moved = from.score[last];
        from.score[at] = moved, from.key[at] = from.key[last], place_[from.key[last]] = static_cast<int32_t>(at);
        from.score[last] = NONE;
        if (score == from.least[at / BLOCK])
            refresh(from, at / BLOCK);
        else
            from.least[at / BLOCK] = std::min(from.least[at / BLOCK], moved);
        if (last / BLOCK != at / BLOCK && moved == from.least[last / BLOCK]) refresh(from, last / BLOCK);
    }
    struct Lowest {
        double score;  // infinity when there is none
        int64_t block;
    };
    Lowest lowest(int64_t s) const {
        const Segment& in = segment_[s];
        Lowest out{NONE, 0};
        for (int64_t b = 0; b * BLOCK < in.size; ++b) out = in.least[b] < out.score ? Lowest{in.least[b], b} : out;
        return out;
    }
    int32_t key(int64_t s, Lowest lowest) const {
        const Segment& in = segment_[s];
        int64_t i = lowest.block * BLOCK;
        while (in.score[i] != lowest.score) ++i;
        return in.key[i];
    }
    int32_t least_idle(const std::vector<uint8_t>& busy) const {  // of the first segment
        const Segment& in = segment_[0];
        int64_t best = -1;
        for (int64_t i = 0; i < in.size; ++i)
            if (!busy[in.key[i]] && (best < 0 || in.score[i] < in.score[best])) best = i;
        return in.key[best];
    }

private:
    static constexpr int64_t BLOCK = 16;
    static constexpr double NONE = std::numeric_limits<double>::infinity();
    struct Segment {
        std::vector<double> score, least;
        std::vector<int32_t> key;
        int64_t size = 0;
    };
    static void refresh(Segment& s, int64_t block) {
        const double* v = s.score.data() + block * BLOCK;
        double a = v[0], b = v[1];
        for (int64_t i = 2; i < BLOCK; i += 2) a = v[i] < a ? v[i] : a, b = v[i + 1] < b ? v[i + 1] : b;
        s.least[block] = a < b ? a : b;
    }
    std::vector<Segment> segment_;
    std::vector<int32_t> place_;
};

// How a policy scores a key: it stands at key[at], and `clock` policies were told of a key before.
class Frequency {  // uses, then the time of the last one; exact while both together stay below 2 ** 53
public:
    Frequency(const Asked& asked, Pool) : uses_(asked.experts(), 0), times_(static_cast<double>(asked.start[asked.demands] + 1)) {}
    void reach(int64_t) {}
    double score(int32_t key, int64_t, int64_t clock) {
        return static_cast<double>(++uses_[key]) * times_ + static_cast<double>(clock);
    }

private:
    std::vector<int64_t> uses_;
    double times_;
};

class NextUse {  // minus the next demand, so that the farthest leaves first; of one demand's keys the lowest leaves first
public:
    NextUse(const Asked& asked, Pool pool)
        : asked_(asked), pool_(pool), block_size_(PASSES * asked.layers), upcoming_(asked.experts(), asked.demands), flipped_(asked.experts()) {
        for (int64_t l = 0; l < asked.layers; ++l)
            for (int64_t e = asked.first[l]; e < asked.first[l + 1]; ++e) flipped_[e] = asked.first[l] + asked.first[l + 1] - 1 - e;
        const int64_t blocks = (asked.demands + block_size_ - 1) / block_size_, experts = asked.experts();
        after_.resize(blocks * experts);
        for (int64_t b = blocks - 1; b >= 0; --b) {  // what is next after each block, so that a block at a time is enough
            std::copy(upcoming_.begin(), upcoming_.end(), after_.begin() + b * experts);
            backward(b, [](int64_t, int64_t) {});
        }
    }
    void reach(int64_t d) {  // demands are reached in ascending order
        if (d / block_size_ == block_) return;
        block_ = d / block_size_, base_ = asked_.start[block_ * block_size_];
        const auto after = after_.begin() + block_ * asked_.experts();
        std::copy(after, after + asked_.experts(), upcoming_.begin());
        next_.resize(asked_.start[std::min(asked_.demands, (block_ + 1) * block_size_)] - base_);
        backward(block_, [&](int64_t a, int64_t next) { next_[a - base_] = next; });
    }
    double score(int32_t key, int64_t at, int64_t) {
        return -static_cast<double>(next_[at - base_] * asked_.experts() + flipped_[key]);
    }

private:
    static constexpr int64_t PASSES = 1024;
    template <class See>
    void backward(int64_t block, See see) {
        const int64_t stop = std::min(asked_.demands, (block + 1) * block_size_);
        for (int64_t d = stop - pool_.stride + pool_.from; d >= block * block_size_; d -= pool_.stride)
            for (int64_t a = asked_.start[d]; a < asked_.start[d + 1]; ++a) {
                see(a, upcoming_[asked_.key[a]]);
                upcoming_[asked_.key[a]] = d;
            }
    }
    const Asked& asked_;
    Pool pool_;
    int64_t block_size_;
    std::vector<int64_t> upcoming_, after_, next_, flipped_;
    int64_t block_ = -1, base_ = 0;
};

// The policies, each ruling one cache.
class Lru {
public:
    Lru(const Asked& asked, Pool) : order_(asked.experts(), 1) {}
    void reach(int64_t) {}
    void insert(int32_t key, int64_t, int64_t) { order_.add(0, key); }
    void touch(int32_t key, int64_t, int64_t) { order_.remove(0, key), order_.add(0, key); }
    int32_t evict(const std::vector<uint8_t>& busy, int32_t) {
        int32_t key = order_.oldest(0);
        while (busy[key]) key = order_.after(key);
        order_.remove(0, key);
        return key;
    }

private:
    Lists order_;
};

template <class Score>
class Ranked {
public:
    Ranked(const Asked& asked, Pool pool) : score_(asked, pool), keys_(asked.experts(), 1) {}
    void reach(int64_t d) { score_.reach(d); }
    void insert(int32_t key, int64_t at, int64_t clock) { keys_.add(0, key, score_.score(key, at, clock)); }
    void touch(int32_t key, int64_t at, int64_t clock) { keys_.remove(0, key), insert(key, at, clock); }
    int32_t evict(const std::vector<uint8_t>& busy, int32_t) {
        const int32_t key = keys_.least_idle(busy);
        keys_.remove(0, key);
        return key;
    }

private:
    Score score_;
    Scores keys_;
};

class Arc {
public:
    Arc(const Asked& asked, int64_t capacity) : lists_(asked.experts(), 4), in_(asked.experts(), NOWHERE), capacity_(capacity) {}
    void reach(int64_t) {}
    void insert(int32_t key, int64_t, int64_t) {
        if (in_[key] == B1 || in_[key] == B2) return move(key, T2);
        move(key, T1);
        if (lists_.size(T1) + lists_.size(B1) > capacity_) forget(B1);
        if (lists_.size(T1) + lists_.size(T2) + lists_.size(B1) + lists_.size(B2) > 2 * capacity_) forget(B2);
    }
    void touch(int32_t key, int64_t, int64_t) { move(key, T2); }
    int32_t evict(const std::vector<uint8_t>& busy, int32_t incoming) {
        const auto b1 = static_cast<double>(lists_.size(B1)), b2 = static_cast<double>(lists_.size(B2));
        const bool again = in_[incoming] == B2;
        if (in_[incoming] == B1)
            target_ = std::min(static_cast<double>(capacity_), target_ + std::max(1.0, b2 / b1));
        else if (again)
            target_ = std::max(0.0, target_ - std::max(1.0, b1 / b2));
        const auto t1 = static_cast<double>(lists_.size(T1));
        const bool first = t1 > target_ || (again && t1 == target_);
        for (const int list : {first ? T1 : T2, first ? T2 : T1})
            for (int32_t key = lists_.oldest(list); !lists_.ends(key); key = lists_.after(key))
                if (!busy[key]) {
                    move(key, list == T1 ? B1 : B2);
                    return key;
                }
        return -1;  // never: the caller leaves one expert idle
    }

private:
    enum List : int8_t { T1, T2, B1, B2, NOWHERE };
    void move(int32_t key, int to) {
        if (in_[key] != NOWHERE) lists_.remove(in_[key], key);
        in_[key] = static_cast<int8_t>(to);
        lists_.add(to, key);
    }
    void forget(int ghosts) {
        const int32_t key = lists_.oldest(ghosts);
        lists_.remove(ghosts, key);
        in_[key] = NOWHERE;
    }
    Lists lists_;
    std::vector<int8_t> in_;
    int64_t capacity_;
    double target_ = 0;
};

class Tally {
public:
    Tally(const Asked& asked, int64_t* out) : asked_(asked), out_(out) {}
    void add(int64_t budget, int64_t d, int64_t demands, int64_t misses, int64_t evictions) {
        const int64_t layer = d % asked_.layers, phase = asked_.prefill[d / asked_.layers];
        int64_t* row = out_ + ((budget * 2 + phase) * asked_.layers + layer) * 3;
        row[0] += demands, row[1] += misses, row[2] += evictions;
    }

private:
    const Asked& asked_;
    int64_t* out_;
};

// One stack, the latest first; last_[i] is the key at depth slots[i], and a key's level says how many of these lie above it.
void count_recent(const Asked& asked, Pool pool, const int64_t* slots, int64_t budgets, Tally tally) {
    const auto end = static_cast<int32_t>(asked.experts()), none = static_cast<int32_t>(budgets);
    std::vector<int32_t> next(end + 1, end), prev(end + 1, end), level(end, none), last(budgets, end);
    std::vector<int64_t> found(budgets + 1), filled(budgets);
    int64_t depth = 0;
    for (int64_t d = pool.from; d < asked.demands; d += pool.stride) {
        const int64_t begin = asked.start[d], stop = asked.start[d + 1];
        if (begin == stop) continue;
        std::fill(found.begin(), found.end(), 0);
        for (int64_t i = 0; i < budgets; ++i) filled[i] = std::min(depth, slots[i]);
        for (int64_t a = begin; a < stop; ++a) ++found[level[asked.key[a]]];
        for (int64_t a = begin; a < stop; ++a) {
            const int32_t key = asked.key[a], from = level[key];
            if (next[end] == key) continue;  // it is the latest
            if (from < none) {
                for (int32_t i = from; i < none && last[i] == key; ++i) last[i] = prev[key];
                next[prev[key]] = next[key], prev[next[key]] = prev[key];
            }
            next[key] = next[end], prev[key] = end;
            prev[next[end]] = key, next[end] = key;
            level[key] = 0;
            for (int32_t i = 0; i < from && depth >= slots[i]; ++i) {
                level[last[i]] = i + 1;
                last[i] = prev[last[i]];
            }
            if (from < none) continue;
            if (depth == slots[budgets - 1]) {
                const int32_t gone = prev[end];
                prev[end] = prev[gone], next[prev[gone]] = end;
            } else {
                ++depth;
                for (int32_t i = 0; i < none; ++i)
                    if (depth == slots[i]) last[i] = prev[end];
            }
        }
        int64_t misses = stop - begin;
        for (int64_t i = 0; i < budgets; ++i) {
            misses -= found[i];
            tally.add(i, d, stop - begin, misses, misses - (std::min(depth, slots[i]) - filled[i]));
        }
    }
}

// Segment i holds what a cache of slots[i] holds and a smaller one does not. Every demand fits into slots[0].
template <class Score>
void count_ranked(const Asked& asked, Pool pool, const int64_t* slots, int64_t budgets, Tally tally) {
    struct Item {
        int32_t key;
        double score;
    };
    Score order(asked, pool);
    Scores held(asked.experts(), budgets);
    std::vector<int32_t> level(asked.experts(), static_cast<int32_t>(budgets));
    std::vector<int64_t> found(budgets + 1);
    std::vector<Item> falling, next;  // ascending
    for (int64_t d = pool.from; d < asked.demands; d += pool.stride) {
        order.reach(d);
        const int64_t begin = asked.start[d], wanted = asked.start[d + 1] - begin;
        if (!wanted) continue;
        std::fill(found.begin(), found.end(), 0);
        for (int64_t a = begin; a < begin + wanted; ++a) {
            const int32_t key = asked.key[a];
            ++found[level[key]];
            if (level[key] < budgets) held.remove(level[key], key);
        }
        int64_t before = 0, after = 0, misses = wanted;
        falling.clear();
        for (int64_t i = 0; i < budgets; ++i) {
            misses -= found[i];
            before += held.size(i);
            next.clear();
            size_t fell = 0;
            Scores::Lowest lowest{};
            for (int64_t many = after + held.size(i) + static_cast<int64_t>(falling.size()) + wanted - slots[i]; many > 0; --many) {
                if (next.empty()) lowest = held.lowest(i);
                if (fell < falling.size() && falling[fell].score < lowest.score) {
                    next.push_back(falling[fell++]);
                    continue;
                }
                const int32_t key = held.key(i, lowest);
                next.push_back({key, lowest.score});
                held.remove(i, key);
                lowest = held.lowest(i);
            }
            for (; fell < falling.size(); ++fell) {
                held.add(i, falling[fell].key, falling[fell].score);
                level[falling[fell].key] = static_cast<int32_t>(i);
            }
            after += held.size(i);
            std::swap(falling, next);
            tally.add(i, d, wanted, misses, before - after);
        }
        for (const auto& item : falling) level[item.key] = static_cast<int32_t>(budgets);
        for (int64_t a = begin; a < begin + wanted; ++a) {
            held.add(0, asked.key[a], order.score(asked.key[a], a, a));
            level[asked.key[a]] = 0;
        }
    }
}

// One cache, demand by demand, in waves where a demand does not fit: what the slot table does without hints and pinned experts.
template <class Rule>
void simulate(const Asked& asked, Pool pool, int64_t slots, int64_t budget, Rule rule, Tally tally) {
    std::vector<uint8_t> resident(asked.experts(), 0), busy(asked.experts(), 0), missed;
    std::vector<int64_t> places;
    int64_t idle = slots, clock = 0, misses = 0, evictions = 0;
    const auto lease = [&](const int64_t* place, int64_t count) {
        missed.assign(count, 0);
        for (int64_t i = 0; i < count; ++i) busy[asked.key[place[i]]] = 1;
        for (int64_t i = 0; i < count; ++i) {
            const int32_t key = asked.key[place[i]];
            if (resident[key]) continue;
            if (idle)
                --idle;
            else
                resident[rule.evict(busy, key)] = 0, ++evictions;
            resident[key] = missed[i] = 1, ++misses;
        }
        for (int64_t i = 0; i < count; ++i, ++clock)
            if (missed[i])
                rule.insert(asked.key[place[i]], place[i], clock);
            else
                rule.touch(asked.key[place[i]], place[i], clock);
    };
    const auto release = [&](const int64_t* place, int64_t count) {
        for (int64_t i = 0; i < count; ++i) busy[asked.key[place[i]]] = 0;
    };
    for (int64_t d = pool.from; d < asked.demands; d += pool.stride) {
        rule.reach(d);
        const int64_t wanted = asked.start[d + 1] - asked.start[d];
        places.resize(wanted);
        for (int64_t i = 0; i < wanted; ++i) places[i] = asked.start[d] + i;
        misses = evictions = 0;
        if (wanted <= slots) {
            lease(places.data(), wanted);
            release(places.data(), wanted);
        } else {
            std::stable_partition(places.begin(), places.end(), [&](int64_t a) { return resident[asked.key[a]]; });
            const int64_t width = std::max<int64_t>(1, slots / 2);
            int64_t held = 0, held_from = 0;  // the wave before stays leased, unless there is one slot only
            for (int64_t i = 0; i < wanted; i += width) {
                if (slots == 1) release(places.data() + held_from, held), held = 0;
                const int64_t count = std::min(width, wanted - i);
                lease(places.data() + i, count);
                release(places.data() + held_from, held);
                held_from = i, held = count;
            }
            release(places.data() + held_from, held);
        }
        if (wanted) tally.add(budget, d, wanted, misses, evictions);
    }
}

// Budgets that some demand does not fit into are simulated, the others counted in one pass.
template <class Rule, class Pass>
void count_ordered(const Asked& asked, Pool pool, const int64_t* slots, int64_t budgets, int64_t* out, Pass pass) {
    int64_t most = 0, small = 0;
    for (int64_t d = pool.from; d < asked.demands; d += pool.stride) most = std::max(most, asked.start[d + 1] - asked.start[d]);
    for (; small < budgets && slots[small] < most; ++small) simulate(asked, pool, slots[small], small, Rule(asked, pool), Tally(asked, out));
    if (small < budgets) pass(asked, pool, slots + small, budgets - small, Tally(asked, out + small * 6 * asked.layers));
}

}  // namespace

template <class Id>
void list_demands(const Id* experts, int64_t layers, int64_t tokens, int64_t slots, const int64_t* cut, int64_t passes,
                  const int64_t* first, uint16_t* key, int64_t* start) {
    int64_t widest = 0, n = 0;
    for (int64_t l = 0; l < layers; ++l) widest = std::max(widest, first[l + 1] - first[l]);
    std::vector<int64_t> times(widest, 0);
    for (int64_t p = 0; p < passes; ++p)
        for (int64_t l = 0; l < layers; ++l) {
            const Id *from = experts + (l * tokens + cut[p]) * slots, *to = experts + (l * tokens + cut[p + 1]) * slots;
            const int64_t begin = start[p * layers + l] = n;
            for (; from < to; ++from)
                if (*from >= 0 && times[*from]++ == 0) key[n++] = static_cast<uint16_t>(*from);
            if (cut[p + 1] - cut[p] == 1)
                std::sort(key + begin, key + n);
            else
                std::sort(key + begin, key + n, [&](uint16_t a, uint16_t b) { return times[a] != times[b] ? times[a] > times[b] : a < b; });
            for (int64_t i = begin; i < n; ++i) {
                times[key[i]] = 0;
                key[i] = static_cast<uint16_t>(key[i] + first[l]);
            }
        }
    start[passes * layers] = n;
}

template void list_demands(const int8_t*, int64_t, int64_t, int64_t, const int64_t*, int64_t, const int64_t*, uint16_t*, int64_t*);
template void list_demands(const int16_t*, int64_t, int64_t, int64_t, const int64_t*, int64_t, const int64_t*, uint16_t*, int64_t*);

void count_replay(const Asked& asked, Policy policy, int64_t layer, const int64_t* slots, int64_t budgets, int64_t* out) {
    const Pool pool = layer < 0 ? Pool{0, 1} : Pool{layer, asked.layers};
    switch (policy) {
        case Policy::lru: return count_ordered<Lru>(asked, pool, slots, budgets, out, count_recent);
        case Policy::lfu: return count_ordered<Ranked<Frequency>>(asked, pool, slots, budgets, out, count_ranked<Frequency>);
        case Policy::belady: return count_ordered<Ranked<NextUse>>(asked, pool, slots, budgets, out, count_ranked<NextUse>);
        case Policy::arc:
            for (int64_t i = 0; i < budgets; ++i) simulate(asked, pool, slots[i], i, Arc(asked, slots[i]), Tally(asked, out));
    }
}

}  // namespace moestro
