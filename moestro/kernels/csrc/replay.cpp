// LRU, LFU and Belady order the experts whatever the capacity, so what a small cache holds a larger one holds too (Mattson et al.
// 1970): one pass counts every budget. ARC, and demands that need waves, are simulated budget by budget as the slot table does.
#include "replay.hpp"

#include <algorithm>
#include <utility>

namespace moestro {
namespace {

constexpr uint64_t ONE = 1, ALL = ~uint64_t{0};

// The demands that one pool of slots serves: all, or those of one layer.
struct Pool {
    int64_t from, stride, first, keys;  // first: its first key
};

// Every demand of a pool that wants something, in order: see(demand, its row in the first budget's tally).
template <class See>
void each(const Asked& asked, Pool pool, int64_t* out, See see) {
    for (int64_t pass = 0; pass * asked.layers < asked.demands; ++pass)
        for (int64_t l = pool.from; l < asked.layers; l += pool.stride) {
            const int64_t d = pass * asked.layers + l;
            if (asked.start[d] < asked.start[d + 1]) see(d, out + (asked.prefill[pass] * asked.layers + l) * 3);
        }
}

void tally(int64_t* row, int64_t demands, int64_t misses, int64_t evictions) {
    row[0] += demands, row[1] += misses, row[2] += evictions;
}

// How a policy scores a key: it stands at key[at], and `clock` policies were told of a key before. The least score leaves.
class Recency {
public:
    Recency(const Asked&, Pool) {}
    void reach(int64_t) {}
    double score(int32_t, int64_t, int64_t clock) { return static_cast<double>(clock); }
};

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

// Caches of one budget. `lease` brings keys in, then tells the policy of them; place(i) is where the i-th of them stands in asked.key.
struct Brought {
    int64_t misses = 0, evictions = 0;
};

// Evicts the least score. A key is busy from its lease to its release.
template <class Score>
class Ranked {
public:
    Ranked(const Asked& asked, Pool pool, int64_t slots)
        : asked_(asked), order_(asked, pool), score_(asked.experts()), in_(asked.experts(), 0), busy_(in_), free_(slots) {}
    bool holds(int32_t key) const { return in_[key]; }
    void reach(int64_t d) { order_.reach(d); }
    template <class Place>
    void lease(int64_t count, Place place, Brought& out, bool waves) {
        for (int64_t i = 0; i < count; ++i) busy_[asked_.key[place(i)]] = 1;
        for (int64_t i = 0; i < count; ++i) {
            const int32_t key = asked_.key[place(i)];
            if (in_[key]) continue;
            ++out.misses;
            if (free_)
                --free_;
            else
                evict(), ++out.evictions;
            in_[key] = 1, held_.push_back(key);
        }
        for (int64_t i = 0; i < count; ++i, ++clock_) score_[asked_.key[place(i)]] = order_.score(asked_.key[place(i)], place(i), clock_);
        if (!waves) release(count, place);
    }
    template <class Place>
    void release(int64_t count, Place place) {
        for (int64_t i = 0; i < count; ++i) busy_[asked_.key[place(i)]] = 0;
    }

private:
    void evict() {
        int64_t least = -1;
        for (int64_t i = 0; i < static_cast<int64_t>(held_.size()); ++i)
            if (!busy_[held_[i]] && (least < 0 || score_[held_[i]] < score_[held_[least]])) least = i;
        in_[held_[least]] = 0;
        held_[least] = held_.back(), held_.pop_back();
    }
    const Asked& asked_;
    Score order_;
    std::vector<double> score_;
    std::vector<uint8_t> in_, busy_;
    std::vector<int32_t> held_;
    int64_t free_, clock_ = 0;
};

// T1 and B1 together stand in the order of their last uses, since what is evicted is the oldest of T1; so do T2 and B2. Hence two doubly
// linked lists, and in each the first key that is no ghost.
class Arc {
public:
    Arc(const Asked& asked, Pool pool, int64_t slots)
        : asked_(asked), first_(static_cast<int32_t>(pool.first)), keys_(static_cast<int32_t>(pool.keys)),
          slots_(static_cast<int32_t>(std::min(slots, pool.keys))), free_(slots_), next_(keys_ + 2), prev_(keys_ + 2), missed_(keys_ + 1),
          hit_(keys_ + 1), in_(keys_, NOWHERE), busy_(keys_ + 2, 0), from_{keys_, keys_ + 1}, size_{0, 0, 0, 0, keys_} {
        for (int32_t i = 0; i < keys_ + 2; ++i) next_[i] = prev_[i] = i;  // a key in no list is its own neighbour; two ends
        busy_[keys_] = busy_[keys_ + 1] = 1;
    }
    bool holds(int32_t key) const { return in_[key - first_] <= T2; }
    void reach(int64_t) {}
    template <class Place>
    void lease(int64_t count, Place place, Brought& out, bool waves) {
        const uint16_t* const keys = asked_.key;
        int32_t *const next = next_.data(), *const prev = prev_.data(), hits = 0, misses = 0;
        uint16_t* const in = in_.data();
        for (int64_t i = 0; i < count; ++i) {
            const int32_t key = keys[place(i)] - first_, held = in[key] <= T2;
            hit_[hits] = missed_[misses] = key;
            hits += held, misses += 1 - held;
        }
        int64_t from1 = from_[T1], from2 = from_[T2];
        for (int32_t i = 0; i < hits; ++i) {  // they are not to be evicted
            const int32_t key = hit_[i];
            from1 = from1 == key ? next[key] : from1, from2 = from2 == key ? next[key] : from2;
            unlink(next, prev, key);
        }
        from_[T1] = from1, from_[T2] = from2;
        const int32_t enter = std::min(free_, misses);
        free_ -= enter;
        out.misses += misses, out.evictions += misses - enter;
        for (int32_t i = enter; i < misses; ++i) evict(in[missed_[i]]);
        const int32_t ends = keys_;
        for (int64_t i = 0; i < count; ++i) {
            const int32_t key = keys[place(i)] - first_, was = in[key], to = was == NOWHERE ? T1 : T2;
            unlink(next, prev, key);
            const int32_t end = ends + to, last = prev[end];
            next[last] = prev[end] = key, prev[key] = last, next[key] = end;
            from_[to] = from_[to] == end ? key : from_[to];
            in[key] = static_cast<uint16_t>(to);
            --size_[was], ++size_[to];
            if (to == T2) continue;
            if (size_[T1] + size_[B1] > slots_)
                forget(B1);
            else if (size_[NOWHERE] + 2 * slots_ < ends)
                forget(B2);
        }
        if (waves)
            for (int64_t i = 0; i < count; ++i) busy_[keys[place(i)] - first_] = 1;
    }
    template <class Place>
    void release(int64_t count, Place place) {
        for (int64_t i = 0; i < count; ++i) busy_[asked_.key[place(i)] - first_] = 0;
    }

private:
    enum List : int32_t { T1, T2, B1, B2, NOWHERE };
    static void unlink(int32_t* next, int32_t* prev, int32_t key) {
        const int32_t after = next[key], before = prev[key];
        next[before] = after, prev[after] = before;
        next[key] = prev[key] = key;
    }
    void forget(int32_t ghosts) {
        const int32_t key = next_[keys_ + ghosts - B1], after = next_[key], end = keys_ + ghosts - B1;
        next_[end] = after, prev_[after] = end;
        next_[key] = prev_[key] = key;
        in_[key] = NOWHERE;
        --size_[ghosts], ++size_[NOWHERE];
    }
    void evict(int32_t incoming) {  // for a key that is in this list
        if (incoming != NOWHERE) {
            const double b1 = static_cast<double>(size_[B1]), b2 = static_cast<double>(size_[B2]);
            if (incoming == B1)
                target_ = std::min<double>(slots_, target_ + std::max(1.0, b2 / b1));
            else
                target_ = std::max(0.0, target_ - std::max(1.0, b1 / b2));
        }
        const double t1 = static_cast<double>(size_[T1]);
        int32_t list = t1 > target_ || (incoming == B2 && t1 == target_) ? T1 : T2;
        if (busy_[from_[list]]) list = T1 + T2 - list;  // all that are left in it are leased
        const int64_t key = from_[list];
        from_[list] = next_[key];
        in_[key] = static_cast<uint16_t>(list + B1);
        --size_[list], ++size_[list + B1];
    }
    const Asked& asked_;
    int32_t first_, keys_, slots_, free_;
    std::vector<int32_t> next_, prev_, missed_, hit_;
    std::vector<uint16_t> in_, busy_;
    int64_t from_[2], size_[5];  // of other types than what is stored in between, so that they need not be read again
    double target_ = 0;
};

// One stack, the latest first; last_[i] is the key at depth slots[i], and a key's level says how many of these lie above it.
void count_recent(const Asked& asked, Pool pool, const int64_t* slots, int64_t budgets, int64_t* out) {
    const auto end = static_cast<int32_t>(asked.experts()), none = static_cast<int32_t>(budgets);
    std::vector<int32_t> next(end + 1, end), prev(end + 1, end), level(end, none), last(budgets, end);
    std::vector<int64_t> found(budgets + 1), filled(budgets);
    int64_t depth = 0;
    each(asked, pool, out, [&](int64_t d, int64_t* row) {
        const int64_t begin = asked.start[d], stop = asked.start[d + 1];
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
            tally(row + i * 6 * asked.layers, stop - begin, misses, misses - (std::min(depth, slots[i]) - filled[i]));
        }
    });
}

// The keys stand in the order of their scores, the least first, and a bit per budget says whether a place's key is in its cache. Every
// demand fits into slots[0].
void count_frequent(const Asked& asked, Pool pool, const int64_t* slots, int64_t budgets, int64_t* out) {
    const int64_t first = pool.first, keys = pool.keys;
    std::vector<uint64_t> held((keys + 63) / 64 * budgets, 0);  // by word of places, then budget
    std::vector<int32_t> at(keys), place(keys);
    std::vector<int64_t> uses(keys, 0), found(budgets), low(budgets, 0);  // uses: by place; low: no word before has a key
    for (int32_t i = 0; i < keys; ++i) at[i] = place[i] = i;
    int64_t seen = 0, changed = 0;
    const auto rise = [&](int32_t key) {  // to the top of those used as often
        const int64_t from = place[key], mine = uses[from] + 1;
        int64_t to = from;
        for (; to + 1 < keys && uses[to + 1] <= mine; ++to) {
            at[to] = at[to + 1], uses[to] = uses[to + 1];
            place[at[to]] = static_cast<int32_t>(to);
        }
        at[to] = key, uses[to] = mine, place[key] = static_cast<int32_t>(to);
        changed = std::min(changed, from / 64);
        for (int64_t w = from / 64; w <= to / 64; ++w) {  // the key's own bit is not set
            uint64_t* word = held.data() + w * budgets;
            if (w > from / 64)
                for (int64_t i = 0; i < budgets; ++i) word[i - budgets] |= word[i] << 63;
            const uint64_t moving = (w > from / 64 ? ALL : ALL << from % 64) & (w < to / 64 ? ALL : ALL >> (63 - to % 64));
            const uint64_t set = w < to / 64 ? 0 : ONE << to % 64;
            for (int64_t i = 0; i < budgets; ++i) word[i] = (word[i] & ~moving) | (((word[i] & moving) >> 1) & moving) | set;
        }
    };
    each(asked, pool, out, [&](int64_t d, int64_t* row) {
        const int64_t begin = asked.start[d], stop = asked.start[d + 1], before = seen;
        std::fill(found.begin(), found.end(), 0);
        for (int64_t a = begin; a < stop; ++a) {
            const int64_t p = place[asked.key[a] - first];
            uint64_t* word = held.data() + p / 64 * budgets;
            for (int64_t i = 0; i < budgets; ++i) {
                found[i] += word[i] >> p % 64 & 1;
                word[i] &= ~(ONE << p % 64);
            }
            seen += uses[p] == 0;
        }
        for (int64_t i = 0; i < budgets; ++i) {
            const int64_t misses = stop - begin - found[i];
            int64_t leaving = misses - (std::min(seen, slots[i]) - std::min(before, slots[i]));
            tally(row + i * 6 * asked.layers, stop - begin, misses, leaving);
            int64_t w = std::min(low[i], changed);
            for (; leaving; ++w)
                for (uint64_t& word = held[w * budgets + i]; word && leaving; --leaving) word &= word - 1;
            low[i] = std::max<int64_t>(0, w - 1);
        }
        changed = keys;
        for (int64_t a = begin; a < stop; ++a) rise(asked.key[a] - static_cast<int32_t>(first));
    });
}

// The optimum needs no look ahead (Jain, Lin 2016): keeping a key from one use to the next takes a slot that no other key has in
// between, and of those that are free the one freed last. A bit per budget says at which moments its slots were freed; the moments of
// a demand follow those of the one before. Every demand fits into slots[0].
void count_optimal(const Asked& asked, Pool pool, const int64_t* slots, int64_t budgets, int64_t* out) {
    const int64_t first = pool.first, keys = pool.keys, words = keys / 8 + 2;
    std::vector<uint64_t> freed(words * budgets, 0), renumbered(words * budgets);  // by word of moments, then budget
    std::vector<int64_t> since(keys, -1), least(budgets, 0), found(budgets), below(words + 1);  // since: moments after the last use
    int64_t now = std::min(keys, slots[budgets - 1]), seen = 0;
    for (int64_t i = 0; i < budgets; ++i)
        for (int64_t p = 0; p < std::min(now, slots[i]); ++p) freed[p / 64 * budgets + i] |= ONE << p % 64;
    const auto renumber = [&] {  // leaves out the moments at which no slot was freed; the largest cache has those of all
        std::fill(renumbered.begin(), renumbered.end(), 0);
        const auto rank = [&](int64_t p) {
            return p % 64 ? below[p / 64] + __builtin_popcountll(freed[p / 64 * budgets + budgets - 1] << (64 - p % 64)) : below[p / 64];
        };
        now = 0;
        for (int64_t w = 0; w < words; ++w) {
            below[w] = now;
            for (uint64_t bits = freed[w * budgets + budgets - 1]; bits; bits &= bits - 1, ++now)
                for (int64_t i = 0; i < budgets; ++i)
                    renumbered[now / 64 * budgets + i] |= (freed[w * budgets + i] >> __builtin_ctzll(bits) & 1) << now % 64;
        }
        below[words] = now;
        for (auto& p : since) p = p < 0 ? p : rank(p);
        for (auto& p : least) p = rank(p);
        std::swap(freed, renumbered);
    };
    each(asked, pool, out, [&](int64_t d, int64_t* row) {
        const int64_t begin = asked.start[d], stop = asked.start[d + 1], wanted = stop - begin, before = seen;
        if (now + wanted > words * 64) renumber();
        std::fill(found.begin(), found.end(), 0);
        for (int64_t a = begin; a < stop; ++a) {
            const int64_t until = since[asked.key[a] - first];
            seen += until < 0;
            for (int64_t i = budgets - 1; i >= 0 && least[i] < until; --i) {
                int64_t w = (until - 1) / 64;
                uint64_t* word = freed.data() + w * budgets + i;
                uint64_t bits = *word & ALL >> (63 - (until - 1) % 64);
                for (; !bits; --w) bits = *(word -= budgets);
                const int64_t bit = 63 - __builtin_clzll(bits);
                *word ^= ONE << bit;
                ++found[i];
                if (w * 64 + bit > least[i]) continue;
                for (; w < words && !*word; ++w) word += budgets;
                least[i] = w < words ? w * 64 + __builtin_ctzll(*word) : now;
            }
        }
        for (int64_t i = 0; i < budgets; ++i) {
            int64_t misses = wanted - found[i];
            tally(row + i * 6 * asked.layers, wanted, misses, misses - (std::min(seen, slots[i]) - std::min(before, slots[i])));
            uint64_t* word = freed.data() + (now - 1) / 64 * budgets + i;
            const uint64_t last = misses && misses <= (now - 1) % 64 ? ((ONE << misses) - 1) << ((now - 1) % 64 + 1 - misses) : 0;
            if (last && (*word & last) == last) *word ^= last, misses = 0;  // often the demand before freed enough
            for (; misses; word -= budgets)
                for (; *word && misses; --misses) *word ^= ONE << (63 - __builtin_clzll(*word));
            if (std::min(keys, slots[i]) == wanted) least[i] = now;  // none was left
        }
        for (const int64_t stop_at = now + wanted; now < stop_at; ++now)
            for (int64_t i = 0; i < budgets; ++i) freed[now / 64 * budgets + i] |= ONE << now % 64;
        for (int64_t a = begin; a < stop; ++a) since[asked.key[a] - first] = now;
    });
}

// One cache, demand by demand, in waves where a demand does not fit: what the slot table does without hints and pinned experts.
template <class Cache>
void simulate(const Asked& asked, Pool pool, int64_t slots, int64_t* out) {
    Cache cache(asked, pool, slots);
    std::vector<int64_t> places;
    int64_t seen = 0;
    each(asked, pool, out, [&](int64_t d, int64_t* row) {
        const int64_t begin = asked.start[d], wanted = asked.start[d + 1] - begin;
        Brought brought;
        if (seen == pool.keys && seen <= slots) return tally(row, wanted, 0, 0);  // all are in it, and nothing leaves any more
        cache.reach(d);
        if (wanted <= slots) {
            const auto place = [&](int64_t i) { return begin + i; };
            cache.lease(wanted, place, brought, false);
        } else {
            places.resize(wanted);
            for (int64_t i = 0; i < wanted; ++i) places[i] = begin + i;
            std::stable_partition(places.begin(), places.end(), [&](int64_t a) { return cache.holds(asked.key[a]); });
            const auto from = [&](int64_t first) { return [&places, first](int64_t i) { return places[first + i]; }; };
            const int64_t width = std::max<int64_t>(1, slots / 2);
            int64_t kept = 0, kept_from = 0;  // the wave before stays leased, unless there is one slot only
            for (int64_t i = 0; i < wanted; i += width) {
                if (slots == 1) cache.release(kept, from(kept_from)), kept = 0;
                const int64_t count = std::min(width, wanted - i);
                cache.lease(count, from(i), brought, true);
                cache.release(kept, from(kept_from));
                kept_from = i, kept = count;
            }
            cache.release(kept, from(kept_from));
        }
        seen += brought.misses;  // while nothing leaves
        tally(row, wanted, brought.misses, brought.evictions);
    });
}

// Budgets that some demand does not fit into are simulated, the others counted in one pass.
template <class Score, class Pass>
void count_ordered(const Asked& asked, Pool pool, const int64_t* slots, int64_t budgets, int64_t* out, Pass pass) {
    int64_t most = 0, small = 0;
    each(asked, pool, out, [&](int64_t d, int64_t*) { most = std::max(most, asked.start[d + 1] - asked.start[d]); });
    for (; small < budgets && slots[small] < most; ++small, out += 6 * asked.layers)
        simulate<Ranked<Score>>(asked, pool, slots[small], out);
    if (small < budgets) pass(asked, pool, slots + small, budgets - small, out);
}

}  // namespace

template <class Id>
void list_demands(const Id* experts, int64_t layers, int64_t tokens, int64_t slots, const int64_t* cut, int64_t passes,
                  const int64_t* first, uint16_t* key, int64_t* start) {
    int64_t widest = 0, n = 0;
    for (int64_t l = 0; l < layers; ++l) widest = std::max(widest, first[l + 1] - first[l]);
    std::vector<int64_t> times(widest, 0);
    std::vector<uint64_t> wanted((widest + 63) / 64, 0);
    for (int64_t p = 0; p < passes; ++p)
        for (int64_t l = 0; l < layers; ++l) {
            const Id *from = experts + (l * tokens + cut[p]) * slots, *to = experts + (l * tokens + cut[p + 1]) * slots;
            const int64_t begin = start[p * layers + l] = n;
            const auto base = static_cast<uint16_t>(first[l]);
            if (cut[p + 1] - cut[p] == 1) {
                for (; from < to; ++from)
                    if (*from >= 0) wanted[*from / 64] |= ONE << *from % 64;
                for (size_t w = 0; w < wanted.size(); ++w)
                    for (; wanted[w]; wanted[w] &= wanted[w] - 1) key[n++] = static_cast<uint16_t>(base + w * 64 + __builtin_ctzll(wanted[w]));
                continue;
            }
            for (; from < to; ++from)
                if (*from >= 0 && times[*from]++ == 0) key[n++] = static_cast<uint16_t>(*from);
            std::sort(key + begin, key + n, [&](uint16_t a, uint16_t b) { return times[a] != times[b] ? times[a] > times[b] : a < b; });
            for (int64_t i = begin; i < n; ++i) {
                times[key[i]] = 0;
                key[i] = static_cast<uint16_t>(base + key[i]);
            }
        }
    start[passes * layers] = n;
}

template void list_demands(const int8_t*, int64_t, int64_t, int64_t, const int64_t*, int64_t, const int64_t*, uint16_t*, int64_t*);
template void list_demands(const int16_t*, int64_t, int64_t, int64_t, const int64_t*, int64_t, const int64_t*, uint16_t*, int64_t*);

void count_replay(const Asked& asked, Policy policy, int64_t layer, const int64_t* slots, int64_t budgets, int64_t* out) {
    const Pool pool = layer < 0 ? Pool{0, 1, 0, asked.experts()}
                                : Pool{layer, asked.layers, asked.first[layer], asked.first[layer + 1] - asked.first[layer]};
    switch (policy) {
        case Policy::lru: return count_ordered<Recency>(asked, pool, slots, budgets, out, count_recent);
        case Policy::lfu: return count_ordered<Frequency>(asked, pool, slots, budgets, out, count_frequent);
        case Policy::belady: return count_ordered<NextUse>(asked, pool, slots, budgets, out, count_optimal);
        case Policy::arc:
            for (int64_t i = 0; i < budgets; ++i) simulate<Arc>(asked, pool, slots[i], out + i * 6 * asked.layers);
    }
}

}  // namespace moestro
