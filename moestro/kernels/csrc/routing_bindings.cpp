// Routing, experts, sums and cached keys for Python: small arrays, so that what a call costs beside its work counts. Everything is checked here.
#include <algorithm>
#include <optional>

#include "kernels.hpp"
#include "step.hpp"
#include "trunk_bindings.hpp"
#include "view.hpp"

namespace moestro {
namespace {

// Contiguous in all axes.
const View& whole(const View& v, char kind, const char* label) {
    bool fits = v.type() == kind;
    int64_t step = kind == 'l' ? 8 : 4;
    for (int axis = v.axes() - 1; axis >= 0; --axis) {
        fits = fits && (v.size(axis) <= 1 || v.stride(axis) == step);
        step *= v.size(axis);
    }
    if (!fits) v.refuse(std::string("contiguous ") + label);
    return v;
}

void call_topk(nb::handle scores_object, nb::handle ids_object, nb::handle values_object) {
    const View scores(scores_object, "scores"), ids(ids_object, "ids", true), values(values_object, "values", true);
    if (scores.axes() != 2 || ids.axes() != 2 || ids.size(0) != scores.size(0) || ids.size(1) > scores.size(1))
        ids.refuse("int64 [T, K] for scores " + scores.shape());
    values.need('f', {ids.size(0), ids.size(1)}, "float32");
    whole(scores, 'f', "float32"), whole(ids, 'l', "int64"), whole(values, 'f', "float32");
    MaybeUnlocked unlocked(scores.items() >= LONG);
    topk(scores.data<const float>(), scores.size(0), scores.size(1), ids.size(1), ids.data<int64_t>(), values.data<float>());
}

// The number of pairs; the outputs have room for T * K and num_experts + 1.
int64_t call_sort_pairs(nb::handle experts_object, nb::handle weights_object, nb::handle token_object, nb::handle slot_object,
                        nb::handle expert_object, nb::handle weight_object, nb::handle starts_object) {
    const View experts(experts_object, "experts"), weights(weights_object, "weights"), token(token_object, "token", true),
        slot(slot_object, "slot", true), expert(expert_object, "expert", true), weight(weight_object, "weight", true),
        starts(starts_object, "starts", true);
    if (experts.axes() != 2) experts.refuse("int64 [T, K]");
    whole(experts, 'l', "int64"), whole(weights, 'f', "float32"), whole(starts, 'l', "int64");
    weights.need('f', {experts.size(0), experts.size(1)}, "float32");
    const int64_t items = experts.items(), num_experts = starts.items() - 1;
    for (const View* v : {&token, &slot, &expert}) whole(*v, 'l', "int64").need('l', {items}, "int64");
    whole(weight, 'f', "float32").need('f', {items}, "float32");
    const int64_t* ids = experts.data<const int64_t>();
    for (int64_t i = 0; i < items; ++i)
        if (ids[i] >= num_experts)
            throw std::invalid_argument("expert " + std::to_string(ids[i]) + " was routed to, but there are " +
                                        std::to_string(num_experts));
    MaybeUnlocked unlocked(items >= LONG);
    sort_pairs(ids, weights.data<const float>(), token.data<int64_t>(), slot.data<int64_t>(), expert.data<int64_t>(),
               weight.data<float>(), starts.data<int64_t>(), experts.size(0), experts.size(1), num_experts);
    return starts.data<const int64_t>()[num_experts];
}

void call_combine(nb::handle out_object, nb::handle token_object, nb::handle slot_object, nb::handle weight_object,
                  nb::handle y_object, int threads) {
    const View out(out_object, "out"), token(token_object, "token"), slot(slot_object, "slot"), weight(weight_object, "weight"),
        y(y_object, "y", true);
    if (out.axes() != 2 || y.axes() != 2 || out.size(1) != y.size(1)) y.refuse("float32 rows as wide as out " + out.shape());
    const int64_t pairs = out.size(0);
    whole(out, 'f', "float32"), whole(y, 'f', "float32");
    whole(token, 'l', "int64").need('l', {pairs}, "int64");
    whole(slot, 'l', "int64").need('l', {pairs}, "int64");
    whole(weight, 'f', "float32").need('f', {pairs}, "float32");
    const auto *tokens = token.data<const int64_t>(), *slots = slot.data<const int64_t>();
    int64_t last = -1;
    for (int64_t n = 0; n < pairs; ++n) {
        if (tokens[n] < 0 || tokens[n] >= y.size(0) || slots[n] < 0)
            throw std::invalid_argument("pair " + std::to_string(n) + " is of token " + std::to_string(tokens[n]) + ", slot " +
                                        std::to_string(slots[n]) + "; there are " + std::to_string(y.size(0)) + " tokens");
        last = std::max(last, slots[n]);
    }
    MaybeUnlocked unlocked(out.items() >= LONG);
    combine(out.data<const float>(), tokens, slots, weight.data<const float>(), y.data<float>(), pairs, y.size(0), y.size(1), last + 1,
            threads);
}

// rows: int64, of x; starts: int64, ascending from 0 to the number of rows.
void call_ffn(nb::handle x_object, nb::handle rows_object, nb::handle starts_object, nb::list experts, int activation, float limit,
              float alpha, nb::handle out_object, nb::handle weight_object, int threads) {
    const View x(x_object, "x"), rows(rows_object, "rows"), starts(starts_object, "starts"), out(out_object, "out", true);
    std::optional<View> weight;
    const int64_t pairs = rows.items(), groups = static_cast<int64_t>(experts.size());
    whole(rows, 'l', "int64").need('l', {pairs}, "int64");
    whole(starts, 'l', "int64").need('l', {groups + 1}, "int64");
    if (x.type() != 'f' || x.axes() != 2 || !x.packed()) x.refuse("float32 rows");
    out.need('f', {pairs, x.size(1)}, "float32 rows");
    if (!weight_object.is_none()) whole(weight.emplace(weight_object, "input weight"), 'f', "float32").need('f', {pairs}, "float32");
    const auto *row = rows.data<const int64_t>(), *start = starts.data<const int64_t>();
    bool fits = start[0] == 0 && start[groups] == pairs;
    for (int64_t g = 0; g < groups; ++g) fits = fits && start[g] <= start[g + 1];
    for (int64_t n = 0; n < pairs; ++n) fits = fits && row[n] >= 0 && row[n] < x.size(0);
    if (!fits) throw std::invalid_argument("rows outside x " + x.shape() + ", or starts that do not ascend from 0 to their number");
    FfnCall call{x.data<const float>(), x.stride(0), row, start, {}, static_cast<Activation>(activation), limit, alpha,
                 out.data<float>(), out.stride(0), weight ? weight->data<const float>() : nullptr, std::max(1, threads)};
    call.experts.reserve(experts.size());
    for (nb::handle expert : experts) {
        call.experts.push_back(nb::cast<const Expert*>(expert));
        if (call.experts.back()->up.cols != x.size(1))
            throw std::invalid_argument("the experts take rows of " + std::to_string(call.experts.back()->up.cols) +
                                        ", the input has " + std::to_string(x.size(1)));
    }
    MaybeUnlocked unlocked(true);
    if (pairs) grouped_ffn(call);
}

// room[k, at + t, d] = rows[t, k, d], rounded to the room's format.
void put(nb::handle room_object, nb::handle rows_object, int64_t at) {
    const View room(room_object, "room", true), rows(rows_object, "rows");
    const char type = room.type();
    if (room.axes() != 3 || !room.packed() || (type != 'f' && type != 'e' && type != 'H'))
        room.refuse("3 axes of float32 or float16 or uint16");
    if (rows.axes() != 3) rows.refuse("float32 [T, K, d]");
    const int64_t tokens = rows.size(0), heads = room.size(0), width = room.size(2);
    rows.need('f', {tokens, heads, width}, "float32");
    if (at < 0 || at + tokens > room.size(1))
        throw std::invalid_argument(std::to_string(tokens) + " rows at " + std::to_string(at) + " of a room of " + room.shape());
    MaybeUnlocked unlocked(rows.items() >= LONG);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t k = 0; k < heads; ++k) {
            const auto* from = reinterpret_cast<const float*>(rows.data<const char>() + t * rows.stride(0) + k * rows.stride(1));
            char* to = room.data<char>() + k * room.stride(0) + (at + t) * room.stride(1);
            store_row(from, width, type == 'f' ? Format::f32 : type == 'e' ? Format::f16 : Format::bf16, to);
        }
}

}  // namespace

void bind_routing(nb::module_& m) {
    m.def("grouped_ffn", &call_ffn, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg().none(), nb::arg());
    m.def("topk", &call_topk);
    m.def("sort_pairs", &call_sort_pairs);
    m.def("combine", &call_combine);
    m.def("put", &put);
}

}  // namespace moestro
