// Replays for Python. The Python side has checked dtypes, shapes and that every id is below its layer's number of experts.
#include <algorithm>
#include <stdexcept>

#include "replay.hpp"
#include "trunk_bindings.hpp"
#include "view.hpp"

namespace nb = nanobind;

namespace moestro {
namespace {

// experts: int8 or int16 [L, T, K], contiguous; cut: int64, passes + 1; first: int64, L + 1. Returns how many keys were written.
int64_t call_list_demands(nb::handle experts_object, nb::handle cut_object, nb::handle first_object, nb::handle key_object,
                          nb::handle start_object) {
    const View experts(experts_object, "experts"), cut(cut_object, "cut"), first(first_object, "first"), key(key_object, "key", true),
        start(start_object, "start", true);
    if (experts.axes() != 3 || !experts.packed() || (experts.type() != 'b' && experts.type() != 'h'))
        experts.refuse("int8 or int16 [L, T, K]");
    const int64_t layers = experts.size(0), passes = cut.items() - 1;
    first.need('l', {layers + 1}, "int64"), start.need('l', {passes * layers + 1}, "int64"), key.need('H', {experts.items()}, "uint16");
    MaybeUnlocked unlocked(true);
    const auto run = [&](const auto* ids) {
        list_demands(ids, layers, experts.size(1), experts.size(2), cut.data<const int64_t>(), passes, first.data<const int64_t>(),
                     key.data<uint16_t>(), start.data<int64_t>());
    };
    if (experts.type() == 'b')
        run(experts.data<const int8_t>());
    else
        run(experts.data<const int16_t>());
    return start.data<const int64_t>()[passes * layers];
}

// slots: int64, ascending; tally: int64 [budgets, 2, L, 3], added to. layer: -1 for one pool of all layers.
void call_count_replay(nb::handle key_object, nb::handle start_object, nb::handle prefill_object, nb::handle first_object, int policy,
                       int64_t layer, nb::handle slots_object, nb::handle tally_object) {
    const View key(key_object, "key"), start(start_object, "start"), prefill(prefill_object, "prefill"), first(first_object, "first"),
        slots(slots_object, "slots"), tally(tally_object, "tally", true);
    const int64_t layers = first.items() - 1, budgets = slots.items(), passes = prefill.items();
    start.need('l', {passes * layers + 1}, "int64"), first.need('l', {layers + 1}, "int64"), slots.need('l', {budgets}, "int64");
    tally.need('l', {budgets, 2, layers, 3}, "int64");
    const auto* sizes = slots.data<const int64_t>();
    if (policy < 0 || policy > static_cast<int>(Policy::arc) || layer >= layers || !std::is_sorted(sizes, sizes + budgets) ||
        (budgets && sizes[0] < 1))
        throw std::invalid_argument("no such policy or layer, or slots that do not ascend from 1");
    const Asked asked{key.data<const uint16_t>(), start.data<const int64_t>(), prefill.data<const uint8_t>(),
                      first.data<const int64_t>(), passes * layers, layers};
    MaybeUnlocked unlocked(true);
    count_replay(asked, static_cast<Policy>(policy), layer, sizes, budgets, tally.data<int64_t>());
}

}  // namespace

void bind_replay(nb::module_& m) {
    m.def("list_demands", &call_list_demands);
    m.def("count_replay", &call_count_replay);
}

}  // namespace moestro
