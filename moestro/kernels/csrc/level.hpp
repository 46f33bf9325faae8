// Instruction sets: what this machine has, and which one is in force.
#pragma once
#include <string>
#include <vector>

#include "ffn.hpp"

namespace moestro {
const std::vector<std::string>& levels();  // slowest first, always at least "scalar"
const FfnLevel& current();
void set_level(const std::string& name);  // std::invalid_argument when this machine lacks it
}  // namespace moestro
