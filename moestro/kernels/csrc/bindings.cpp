// With trunk_bindings.cpp, routing_bindings.cpp and replay_bindings.cpp the only files that know Python. Here addresses come as integers: the Python side
// has checked dtypes, shapes and strides.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <system_error>

#include "kernels.hpp"
#include "level.hpp"
#include "packed.hpp"
#include "reader.hpp"
#include "trunk_bindings.hpp"

namespace nb = nanobind;
using namespace moestro;

namespace {

using Address = uintptr_t;
using Unlocked = nb::gil_scoped_release;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Native kernels; use the modules of moestro.kernels instead.";
    // An engine that is still open when the interpreter ends is no defect of the bindings, and nobody can act on the report.
    nanobind::set_leak_warnings(false);
    m.def("levels", &levels);
    m.def("level", [] { return std::string(current().name); });
    m.def("set_level", &set_level);
    m.def("packed_level", [] { return std::string(current().packed->name); });

    nb::class_<Expert>(m, "Expert").def(
        "__init__",
        [](Expert* self, const std::optional<PackedMatrix>& gate, const PackedMatrix& up, const PackedMatrix& down,
           Address gate_bias, Address up_bias, Address down_bias) {
            new (self) Expert{gate.has_value(),           matrix_of(gate.value_or(up)), matrix_of(up),
                              matrix_of(down),            at<const float>(gate_bias),   at<const float>(up_bias),
                              at<const float>(down_bias)};
        },
        nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg());

    m.def("ffn_scratch_bytes", &ffn_scratch_bytes);

    m.def("pack_tiles", [](const PackedMatrix& to, Address codes, Address scales, int threads) {
        Unlocked unlocked;
        pack_tiles(matrix_of(to), at<const uint8_t>(codes), at<const uint8_t>(scales), threads);
    });
    m.def("quantise_tiles", [](const PackedMatrix& to, const PackedMatrix& from, int threads) {
        Unlocked unlocked;
        return static_cast<int>(quantise_tiles(matrix_of(to), matrix_of(from), threads));
    });
    m.def("to_f32", [](Address values, Address out, int64_t count, bool half, int threads) {
        Unlocked unlocked;
        to_f32(at<const uint16_t>(values), at<float>(out), count, half, threads);
    });
    m.def("to_bf16", [](Address values, Address out, int64_t count, int threads) {
        Unlocked unlocked;
        to_bf16(at<const float>(values), at<uint16_t>(out), count, threads);
    });
    m.def("transpose", [](Address in, int64_t stride, int64_t step, int64_t rows, int64_t cols, int item, Address out, int threads) {
        Unlocked unlocked;
        transpose(at<const void>(in), stride, step, rows, cols, item, at<void>(out), threads);
    });
    m.def("populate", [](Address buffer, int64_t bytes) {
        Unlocked free;
        return populate(at<void>(buffer), bytes);
    });
    m.def("has_crc32", &has_crc32);
    m.def("crc32", [](Address data, int64_t count, uint32_t before) {
        Unlocked free;
        return crc32(at<const void>(data), count, before);
    });
    m.def("read_bandwidth", [](Address buffer, int64_t bytes, double seconds, int threads) {
        Unlocked unlocked;
        return read_bandwidth(at<const void>(buffer), bytes, seconds, threads);
    });

    bind_trunk(m);
    bind_routing(m);
    bind_step(m);
    bind_replay(m);

    using Request = std::tuple<int64_t, int64_t, int64_t, Address>;
    nb::class_<Queue>(m, "Queue")
        .def(nb::init<int, bool, int64_t, int64_t>())
        .def("add",
             [](Queue& self, const std::string& path) {
                 try {
                     return self.add(path);
                 } catch (const std::system_error& error) {
                     errno = error.code().value();
                     PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
                     throw nb::python_error();
                 }
             })
        .def("reserve", &Queue::reserve)
        .def("submit",
             [](Queue& self, int64_t ticket, const std::vector<Request>& reads, int hurry) {
                 std::vector<ReadRequest> requests;
                 requests.reserve(reads.size());
                 for (auto& [file, offset, bytes, into] : reads) requests.push_back({file, offset, bytes, at<char>(into)});
                 Unlocked unlocked;
                 self.submit(ticket, requests, hurry);
             })
        .def("reap", &Queue::reap)
        .def("wait",
             [](Queue& self, int64_t ticket) {
                 int code = 0;
                 std::string message;
                 for (;;) {
                     bool ended;
                     {
                         Unlocked unlocked;
                         ended = self.wait(ticket, std::chrono::milliseconds(100), code, message);
                     }
                     if (ended) return std::make_pair(code, message);
                     if (PyErr_CheckSignals() != 0) throw nb::python_error();  // Ctrl-C
                 }
             })
        .def("done", &Queue::done)
        .def("promote", &Queue::promote)
        .def("cancel", &Queue::cancel)
        .def("close", &Queue::close, nb::call_guard<Unlocked>())
        .def_prop_ro("bytes_read", &Queue::bytes_read)
        .def_prop_ro("seconds_busy", &Queue::seconds_busy);
}
