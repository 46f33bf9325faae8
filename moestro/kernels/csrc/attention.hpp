// What the instruction sets need to know of attention.
#pragma once
#include <cstdint>

#include "ffn.hpp"

namespace moestro {

constexpr int SPAN = 128;  // keys softened together; spans begin at its multiples
constexpr int PANEL = 32;  // columns of the values added up together

struct Cache {  // [positions, heads, width] of f32, f16 or bf16, the last axis contiguous; strides in bytes
    Format format;
    const uint8_t* data;
    int64_t stride, head_stride;
    int64_t positions, width;
};

}  // namespace moestro
