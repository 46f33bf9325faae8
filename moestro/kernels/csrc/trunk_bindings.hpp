// Shared by the files that know Python.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "ffn.hpp"

namespace moestro {

using PackedMatrix = std::array<int64_t, 9>;  // Matrix.pack()
MatrixRef matrix_of(const PackedMatrix& packed);

void bind_trunk(nanobind::module_& m);
void bind_routing(nanobind::module_& m);
void bind_step(nanobind::module_& m);
void bind_replay(nanobind::module_& m);

}  // namespace moestro
