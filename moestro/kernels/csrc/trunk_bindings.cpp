// The decoder's kernels for Python. Arrays are checked here, not there: a decode step makes hundreds of calls.
#include "trunk_bindings.hpp"

#include <array>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "packed.hpp"
#include "trunk.hpp"
#include "view.hpp"

namespace nb = nanobind;

namespace moestro {
namespace {

class MaybeView {  // None stands for no array
public:
    MaybeView(nb::handle object, const char* name) {
        if (!object.is_none()) view_.emplace(object, name);
    }
    const float* floats(int64_t size) const {
        if (!view_) return nullptr;
        view_->need('f', {size}, "float32");
        return view_->data<const float>();
    }

private:
    std::optional<View> view_;
};

struct Linear {  // one matrix with its output and bias, held until the call ends
    View out;
    MaybeView bias;
    LinearJob job;
    Linear(const View& x, const MatrixRef& weight, nb::handle out_object, nb::handle bias_object)
        : out(out_object, "out", true), bias(bias_object, "bias") {
        if (x.type() != 'f' || x.axes() != 2 || !x.packed() || x.size(1) != weight.cols)
            x.refuse("float32 rows of " + std::to_string(weight.cols));
        out.need('f', {x.size(0), weight.rows}, "float32 rows");
        job = {&weight, out.data<float>(), out.stride(0), bias.floats(weight.rows)};
    }
};

void call_linears(const View& x, const std::vector<LinearJob>& jobs, int threads) {
    int64_t work = 0;
    for (auto& job : jobs) work += job.weight->rows * job.weight->cols * x.size(0);
    MaybeUnlocked unlocked(work >= LONG);
    linears(x.data<const float>(), x.stride(0), x.size(0), jobs, threads);
}

void linear_one(nb::handle x_object, const MatrixRef& weight, nb::handle out, nb::handle bias, int threads) {
    const View x(x_object, "x");
    const Linear one(x, weight, out, bias);
    call_linears(x, {one.job}, threads);
}

void linear_many(nb::handle x_object, nb::list weights, nb::list outs, nb::list biases, int threads) {
    const View x(x_object, "x");
    std::vector<std::unique_ptr<Linear>> all;
    std::vector<LinearJob> jobs;
    for (size_t i = 0; i < weights.size(); ++i) {
        all.emplace_back(new Linear(x, nb::cast<const MatrixRef&>(weights[i]), outs[i], biases[i]));
        jobs.push_back(all.back()->job);
    }
    call_linears(x, jobs, threads);
}

void call_unpack_rows(const MatrixRef& weight, nb::handle ids_object, nb::handle out_object) {
    const View ids(ids_object, "ids"), out(out_object, "out", true);
    if (ids.type() != 'l' || ids.axes() != 1) ids.refuse("int64 (N)");
    out.need('f', {ids.size(0), weight.cols}, "float32");
    if (!in_tiles(weight.format)) throw std::invalid_argument("these weights are not in tiles");
    for (int64_t n = 0; n < ids.size(0); ++n) {
        const int64_t row = *reinterpret_cast<const int64_t*>(ids.data<const char>() + n * ids.stride(0));
        if (row < 0 || row >= weight.rows) throw std::out_of_range("row " + std::to_string(row) + " of " + std::to_string(weight.rows));
        unpack_row(weight, row, reinterpret_cast<float*>(out.data<char>() + n * out.stride(0)));
    }
}

Rows3 rows3(const View& v) {  // two axes: every row is a token of one head
    return {v.data<char>(), v.stride(0), v.axes() == 3 ? v.stride(1) : 0};
}

void need_rows(const View& v) {
    if (v.type() != 'f' || !v.packed()) v.refuse("float32 rows");
    if (v.axes() != 2 && v.axes() != 3) v.refuse("float32 with two axes or three");
}

void norm(nb::handle x_object, nb::handle y_object, float scale, nb::handle weight_object, float eps, nb::handle out_object,
          bool plus_one) {
    const bool add = !y_object.is_none();
    const View x(x_object, "x", add), out(out_object, "out", true), weight(weight_object, "weight");
    std::optional<View> y;
    need_rows(x);
    const int last = x.axes() - 1;
    weight.need('f', {x.size(last)}, "float32");
    if (x.axes() == 3)
        out.need('f', {x.size(0), x.size(1), x.size(2)}, "float32");
    else
        out.need('f', {x.size(0), x.size(1)}, "float32");
    Rows3 more{};
    if (add) {
        y.emplace(y_object, "what is to add");
        if (x.axes() != 2) x.refuse("float32 with two axes");
        y->need('f', {x.size(0), x.size(1)}, "float32");
        more = rows3(*y);
    }
    MaybeUnlocked unlocked(x.items() >= LONG);
    rms_norm(rows3(x), add ? &more : nullptr, scale, weight.data<const float>(), eps, plus_one ? 1.0f : 0.0f, rows3(out), x.size(0),
             x.axes() == 3 ? x.size(1) : 1, x.size(last));
}

void call_rotate(nb::handle x_object, nb::handle cos_object, nb::handle sin_object, bool interleaved, int64_t start) {
    const View x(x_object, "x", true), cos(cos_object, "cos"), sin(sin_object, "sin");
    if (x.type() != 'f' || x.axes() != 3 || !x.packed()) x.refuse("float32 [T, H, d]");
    if (cos.axes() != 2) cos.refuse("float32 [T, R]");
    const int64_t rotated = cos.size(1);
    cos.need('f', {x.size(0), rotated}, "float32");
    sin.need('f', {x.size(0), rotated}, "float32");
    if (rotated % 2 || start < 0 || start + rotated > x.size(2))
        throw std::invalid_argument("cannot rotate dimensions " + std::to_string(start) + " to " + std::to_string(start + rotated) +
                                    " of " + std::to_string(x.size(2)));
    Rows3 part = rows3(x);
    part.data += start * 4;
    MaybeUnlocked unlocked(x.items() >= LONG);
    rotate(part, cos.data<const char>(), cos.stride(0), sin.data<const char>(), sin.stride(0), x.size(0), x.size(1), rotated / 2,
           interleaved);
}

template <void (*function)(const char*, int64_t, float*, int64_t, int64_t)>
void row_wise(nb::handle x_object, nb::handle out_object) {
    const View x(x_object, "scores"), out(out_object, "out", true);
    if (x.type() != 'f' || x.axes() != 2 || !x.packed()) x.refuse("float32 [T, E]");
    out.need('f', {x.size(0), x.size(1)}, "float32");
    if (x.size(0) > 1 && x.size(1) > 0 && out.stride(0) != 4 * x.size(1)) out.refuse("contiguous float32");
    MaybeUnlocked unlocked(x.items() >= LONG);
    function(x.data<const char>(), x.stride(0), out.data<float>(), x.size(0), x.size(1));
}

Cache cache(const View& v) {
    const char type = v.type();
    if (v.axes() != 3 || !v.packed() || (type != 'f' && type != 'e' && type != 'H'))
        v.refuse("3 axes of float32 or float16 or uint16");
    const Format format = type == 'f' ? Format::f32 : type == 'e' ? Format::f16 : Format::bf16;
    return {format, v.data<const uint8_t>(), v.stride(0), v.stride(1), v.size(0), v.size(2)};
}

void call_attend(nb::handle q_object, nb::handle keys_object, nb::handle values_object, nb::handle lengths_object, float scale,
                 int64_t window, nb::handle sinks_object, float softcap, int threads, nb::handle out_object) {
    const View q(q_object, "q"), keys(keys_object, "keys"), values(values_object, "values"), lengths(lengths_object, "lengths"),
        out(out_object, "out", true);
    const MaybeView sinks(sinks_object, "sinks");
    if (q.type() != 'f' || q.axes() != 3 || !q.packed()) q.refuse("3 axes of float32");
    const Cache k = cache(keys), v = cache(values);
    const int64_t tokens = q.size(0), heads = q.size(1), shared = keys.size(1);
    if (k.width != q.size(2) || values.size(0) != k.positions || values.size(1) != shared || shared == 0 || heads % shared)
        throw std::invalid_argument("queries " + q.shape() + ", keys " + keys.shape() + " and values " + values.shape() +
                                    " do not fit one another");
    out.need('f', {tokens, heads, v.width}, "float32");
    if (lengths.axes() != 1 || lengths.size(0) != tokens || (lengths.type() != 'l' && lengths.type() != 'i'))
        lengths.refuse("int64 (" + std::to_string(tokens) + ")");
    std::vector<int64_t> seen(static_cast<size_t>(tokens));
    for (int64_t t = 0; t < tokens; ++t) {
        const char* place = lengths.data<const char>() + t * lengths.stride(0);
        if (lengths.type() == 'l') {
            std::memcpy(&seen[t], place, 8);
        } else {
            int32_t value;
            std::memcpy(&value, place, 4);
            seen[t] = value;
        }
        if (seen[t] < 0 || seen[t] > k.positions)
            throw std::invalid_argument("lengths hold " + std::to_string(seen[t]) + "; the cache holds " + std::to_string(k.positions));
    }
    if (window < 0 || softcap < 0) throw std::invalid_argument("window and softcap must not be negative");
    const AttendCall call{rows3(q), rows3(out), k,      v,       tokens,
                          heads,    shared,     seen.data(), scale, window,
                          sinks.floats(heads), softcap, threads};
    MaybeUnlocked unlocked(attend_work(call) >= LONG);
    attend(call);
}

}  // namespace

MatrixRef matrix_of(const PackedMatrix& p) {
    const auto at = [&](int i) { return reinterpret_cast<const uint8_t*>(p[i]); };
    const Format format = static_cast<Format>(p[0]);
    const int group = static_cast<int>(p[8]);
    if (in_tiles(format)) return {format, at(1), 0, p[3], p[4], nullptr, 0, true, group, at(5), at(6)};
    return {format, at(1), p[2], p[3], p[4], at(5), p[6], p[7] != 0, group, nullptr, nullptr};
}

void bind_trunk(nb::module_& m) {
    nb::class_<MatrixRef>(m, "Matrix").def("__init__", [](MatrixRef* self, const PackedMatrix& p) {
        new (self) MatrixRef(matrix_of(p));
    });
    m.def("unpack_rows", &call_unpack_rows);
    m.def("linear", &linear_one, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg());
    m.def("linears", &linear_many);
    m.def("rms_norm", [](nb::handle x, nb::handle weight, float eps, nb::handle out, bool plus_one) {
        norm(x, nb::none(), 1.0f, weight, eps, out, plus_one);
    });
    m.def("add_rms_norm", &norm);
    m.def("rotate", &call_rotate);
    m.def("softmax", &row_wise<softmax>);
    m.def("sigmoid", &row_wise<sigmoid>);
    m.def("attend", &call_attend, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
          nb::arg(), nb::arg());
}

}  // namespace moestro
