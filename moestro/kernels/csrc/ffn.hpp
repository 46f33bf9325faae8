// Feed-forward of many experts: plain structures, the scheduler, and the table of functions that each instruction set fills.
#pragma once
#include <cstdint>
#include <vector>

namespace moestro {

enum class Format : int {
    f32, f16, bf16, int8, int4, mxfp4, uint4,  // rows; uint4: `scales` holds pairs of a float16 scale and minimum
    tiles_int8, tiles_int4, tiles_int3, tiles_int2, tiles_mxfp4, tiles_nested, tiles_uint4,  // packed.hpp; `stride`, `scales` and so on mean nothing
    tiles_sign,  // a further plane of nested
};
enum class Activation : int { silu, gelu, gelu_tanh, relu, relu2, swiglu_clamped };

struct MatrixRef {  // [rows, cols], output rows first; strides in bytes
    Format format;
    const uint8_t* data;
    int64_t stride;
    int64_t rows, cols;
    const uint8_t* scales;
    int64_t scale_stride;
    bool half_scales;
    int group;
    const uint8_t *third = nullptr, *fourth = nullptr;  // planes of nested tiles, or null
};

struct Expert {
    bool gated;
    MatrixRef gate, up, down;
    const float *gate_bias, *up_bias, *down_bias;
};

constexpr int TILE = 16;        // output rows computed together
constexpr int BLOCK = 256;      // inputs expanded to float together; a multiple of every group's unit of 32
constexpr int ROWS = 120;       // tokens computed together
constexpr int MAX_LANES = 16;

struct alignas(64) Scratch {  // one per thread, allocated once
    float weights[TILE * BLOCK];
    float sums[TILE * ROWS * MAX_LANES];
    float gate[ROWS * TILE];
    float up[ROWS * TILE];
};

struct Cache;  // attention.hpp
struct PackedLevel;  // packed.hpp

struct FfnLevel {
    const char* name;
    // out[r * TILE + i] = dot(w[first + i], x[r]) for count <= TILE rows of w and rows <= ROWS tokens
    void (*product)(const MatrixRef& w, int64_t first, int count, const float* const* x, int rows, float* out, Scratch& scratch);
    // h[i] = act(gate[i]) * up[i], or act(up[i]) when gate is null
    void (*activate)(const float* gate, const float* up, int count, Activation activation, float limit, float alpha, float* h);
    // scores[begin..end) of a span become exponentials of scale * score less the largest, which goes to `top`; returns their sum
    float (*soften)(float* scores, int begin, int end, float scale, float softcap, float* top);
    // sums[r] += the values from `position` on, key k times weights[r * SPAN + k], for k in begin[r]..end[r); rows of sums are padded
    void (*blend)(const Cache& values, int64_t position, const float* weights, const int* begin, const int* end, int rows,
                  float* sums, int64_t sums_stride, Scratch& scratch);
    const PackedLevel* packed;  // level.cpp chooses it
};

// Null where the compiler's target lacks the instruction set.
const FfnLevel* ffn_scalar();
const FfnLevel* ffn_avx2();
const FfnLevel* ffn_avx512();
const FfnLevel* ffn_neon();

struct FfnCall {
    const float* x;
    int64_t x_stride;  // bytes
    const int64_t* rows;
    const int64_t* starts;
    std::vector<const Expert*> experts;
    Activation activation;
    float limit, alpha;
    float* out;
    int64_t out_stride;  // bytes
    const float* input_weight;
    int threads;
};

void grouped_ffn(const FfnCall& call);
int64_t ffn_scratch_bytes();  // held between calls

}  // namespace moestro
