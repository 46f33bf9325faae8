// A decode step's calls for Python. Plans are made once, from addresses and shapes that the Python side has checked; arrays of a step are checked here.
#include "step.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "packed.hpp"
#include "trunk_bindings.hpp"
#include "view.hpp"

namespace moestro {
namespace {

using Address = uintptr_t;
using Map = std::tuple<nb::object, Address>;  // matrix, bias
using Attention = std::tuple<std::vector<Map>, std::tuple<int64_t, int64_t, int64_t>, std::tuple<Address, Address, bool>, float, bool,
                             float, int64_t, Address>;
using Router = std::tuple<Map, int64_t, int64_t, int, Address, bool, float, int, float, float>;
using Dense = std::tuple<nb::object, std::optional<Map>, int>;

const float* floats(Address address) { return reinterpret_cast<const float*>(address); }

Affine affine(const Map& map) { return {nb::cast<const MatrixRef&>(std::get<0>(map)), floats(std::get<1>(map))}; }

void make(LayerPlan* self, int64_t width, float eps, float residual, Address post_norm, Address next_norm, const Attention& attention,
          const std::optional<Router>& router, const std::optional<Dense>& dense) {
    const auto& [maps, sizes, norms, clip, interleaved, scale, window, sinks] = attention;
    new (self) LayerPlan{width,
                         eps,
                         residual,
                         floats(post_norm),
                         floats(next_norm),
                         {affine(maps.at(0)), affine(maps.at(1)), affine(maps.at(2)), affine(maps.at(3)), std::get<0>(sizes),
                          std::get<1>(sizes), std::get<2>(sizes), floats(std::get<0>(norms)), floats(std::get<1>(norms)),
                          std::get<2>(norms), clip, interleaved, scale, window, floats(sinks)},
                         nullptr,
                         nullptr};
    if (router) {
        const auto& [map, experts, chosen, score, bias, renormalised, by, activation, limit, alpha] = *router;
        self->router.reset(new RouterPart{affine(map), experts, chosen, static_cast<Score>(score), floats(bias), renormalised, by,
                                          static_cast<Activation>(activation), limit, alpha});
    }
    if (dense) {
        const auto& [mlp, gate, activation] = *dense;
        self->dense.reset(new DensePart{nb::cast<const Expert&>(mlp), gate.has_value(), gate ? affine(*gate) : Affine{},
                                        static_cast<Activation>(activation)});
    }
}

Cache room(const View& v, const AttentionPart& a, int64_t at) {  // [K, S, d], of which positions 0..at are seen
    const char type = v.type();
    if (v.axes() != 3 || !v.packed() || (type != 'f' && type != 'e' && type != 'H') || v.size(0) != a.shared || v.size(2) != a.width)
        v.refuse("a cache of " + std::to_string(a.shared) + " heads, " + std::to_string(a.width) + " wide");
    if (at < 0 || at >= v.size(1)) throw std::invalid_argument("no room at " + std::to_string(at) + " of a cache " + v.shape());
    const Format format = type == 'f' ? Format::f32 : type == 'e' ? Format::f16 : Format::bf16;
    return {format, v.data<const uint8_t>(), v.stride(1), v.stride(0), at + 1, v.size(2)};
}

void call_before(const LayerPlan& plan, nb::handle x_object, nb::handle normed_object, nb::handle keys_object, nb::handle values_object,
                 int64_t at, nb::handle cos_object, nb::handle sin_object, nb::handle ids_object, nb::handle weights_object, int threads) {
    const View x(x_object, "x", true), normed(normed_object, "normed", true), keys(keys_object, "keys", true),
        values(values_object, "values", true), cos(cos_object, "cos"), sin(sin_object, "sin"), ids(ids_object, "ids", true),
        weights(weights_object, "weights", true);
    x.need('f', {1, plan.width}, "float32");
    normed.need('f', {1, plan.width}, "float32");
    if (cos.axes() != 2 || cos.size(1) % 2 || cos.size(1) > plan.attention.width) cos.refuse("float32 (1, R)");
    cos.need('f', {1, cos.size(1)}, "float32");
    sin.need('f', {1, cos.size(1)}, "float32");
    if (plan.router) {
        ids.need('l', {1, plan.router->chosen}, "int64");
        weights.need('f', {1, plan.router->chosen}, "float32");
    }
    const CachePlace place{room(keys, plan.attention, at), room(values, plan.attention, at), at};
    MaybeUnlocked unlocked(true);
    before_experts(plan, x.data<float>(), normed.data<float>(), place, cos.data<const float>(), sin.data<const float>(), cos.size(1),
                   ids.data<int64_t>(), weights.data<float>(), threads);
}

void call_after(const LayerPlan& plan, nb::handle x_object, nb::handle normed_object, nb::list experts, nb::handle weights_object,
                int threads) {
    const View x(x_object, "x", true), normed(normed_object, "normed", true), weights(weights_object, "weights");
    x.need('f', {1, plan.width}, "float32");
    normed.need('f', {1, plan.width}, "float32");
    const int64_t wanted = plan.router ? plan.router->chosen : 0;
    if (static_cast<int64_t>(experts.size()) != wanted)
        throw std::invalid_argument(std::to_string(experts.size()) + " experts; expected " + std::to_string(wanted));
    if (wanted) weights.need('f', {1, wanted}, "float32");
    std::vector<const Expert*> chosen;
    chosen.reserve(experts.size());
    for (nb::handle object : experts) {
        const auto* expert = nb::cast<const Expert*>(object);
        if (expert->up.cols != plan.width || (!chosen.empty() && in_tiles(expert->up.format) != in_tiles(chosen[0]->up.format)))
            throw std::invalid_argument("these experts do not take rows of " + std::to_string(plan.width) + ", or do not share a layout");
        chosen.push_back(expert);
    }
    MaybeUnlocked unlocked(true);
    after_choice(plan, x.data<float>(), normed.data<float>(), chosen, weights.data<const float>(), threads);
}

struct Stack {
    std::vector<Storey> storeys;
    int64_t slots = 0;  // of the layer with the most
    Spent spent;
};

void make_stack(Stack* self, const std::vector<const LayerPlan*>& plans, const std::vector<int64_t>& shelves) {
    if (plans.size() != shelves.size()) throw std::invalid_argument("each layer has a place on the shelf");
    new (self) Stack;
    for (size_t i = 0; i < plans.size(); ++i) {
        self->storeys.push_back({plans[i], shelves[i]});
        if (plans[i]->router) self->slots = std::max(self->slots, plans[i]->router->chosen);
    }
}

int64_t call_climb(Stack& stack, int64_t first, nb::handle x_object, nb::handle normed_object, nb::list rooms, nb::handle cos_object,
                   nb::handle sin_object, const Shelf& shelf, nb::handle ids_object, nb::handle weights_object, int threads) {
    const auto layers = static_cast<int64_t>(stack.storeys.size());
    if (first < 0 || first >= layers || static_cast<int64_t>(rooms.size()) != layers - first)
        throw std::invalid_argument(std::to_string(rooms.size()) + " caches for layers " + std::to_string(first) + " to " + std::to_string(layers));
    const View x(x_object, "x", true), normed(normed_object, "normed", true), cos(cos_object, "cos"), sin(sin_object, "sin"),
        ids(ids_object, "ids", true), weights(weights_object, "weights", true);
    const int64_t width = stack.storeys.front().plan->width, rotated = cos.axes() == 2 ? cos.size(1) : -1;
    x.need('f', {1, width}, "float32");
    normed.need('f', {1, width}, "float32");
    cos.need('f', {1, rotated}, "float32");
    sin.need('f', {1, rotated}, "float32");
    ids.need('l', {layers, stack.slots}, "int64");
    weights.need('f', {layers, stack.slots}, "float32");
    if (stack.slots && layers > 1 && (ids.stride(0) != stack.slots * 8 || weights.stride(0) != stack.slots * 4))
        ids.refuse("rows without gaps");
    std::vector<std::unique_ptr<View>> held;
    std::vector<CachePlace> places;
    for (int64_t i = first; i < layers; ++i) {
        const LayerPlan& plan = *stack.storeys[static_cast<size_t>(i)].plan;
        if (plan.width != width || rotated % 2 || rotated > plan.attention.width) throw std::invalid_argument("layers of one width, turned alike");
        const auto [keys, values, at] = nb::cast<std::tuple<nb::object, nb::object, int64_t>>(rooms[static_cast<size_t>(i - first)]);
        held.push_back(std::make_unique<View>(keys, "keys", true));
        held.push_back(std::make_unique<View>(values, "values", true));
        places.push_back({room(*held[held.size() - 2], plan.attention, at), room(*held.back(), plan.attention, at), at});
    }
    MaybeUnlocked unlocked(true);
    return climb(stack.storeys, first, x.data<float>(), normed.data<float>(), places, cos.data<const float>(), sin.data<const float>(),
                 rotated, shelf, ids.data<int64_t>(), weights.data<float>(), stack.slots, threads, stack.spent);
}

}  // namespace

void bind_step(nb::module_& m) {
    nb::class_<LayerPlan>(m, "LayerPlan")
        .def("__init__", &make, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none());
    nb::class_<Shelf>(m, "Shelf")
        .def(nb::init<int64_t, int64_t>())
        .def("put", &Shelf::put, nb::arg(), nb::arg(), nb::arg().none());
    nb::class_<Stack>(m, "Stack").def("__init__", &make_stack).def_prop_ro("spent", [](const Stack& s) {
        return std::make_tuple(s.spent.before, s.spent.after);
    });
    m.def("before_experts", &call_before);
    m.def("climb", &call_climb);
    m.def("after_choice", &call_after);
}

}  // namespace moestro
