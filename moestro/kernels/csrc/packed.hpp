// Weights in tiles of 16 output rows (the layout is described in packed.py) times activations rounded to int8.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "ffn.hpp"
#include "trunk.hpp"

namespace moestro {

constexpr int STEP = 32;    // inputs that share an activation scale
constexpr int BUNDLE = 128;  // rows of activations multiplied together, at most
constexpr int AHEAD = 2560;  // bytes of a run of tiles asked for before their turn, as measured; hardware prefetch stops at each page

// Up to BUNDLE rows of activations: codes [blocks][rows][STEP], scales and sums of codes [blocks][rows].
struct Bundle {
    const int8_t* codes;
    const float* scales;
    const int32_t* sums;
    int rows;
};

// What became of weights that were to be encoded, the worst last.
enum class Fit : int { good, too_large, not_finite };  // too_large: for float16 scales

struct PackedLevel {
    const char* name;
    // out[(t * x.rows + r) * TILE + i] = dot(row 16 (tile + t) + i of w, row r of x) for t < count
    void (*product)(const MatrixRef& w, int64_t tile, int count, const Bundle& x, float* out);
    // Rounds `blocks` times STEP floats; block b goes to codes + b * stride * STEP, scales + b * stride and sums + b * stride.
    void (*round)(const float* x, int64_t blocks, int8_t* codes, float* scales, int32_t* sums, int64_t stride);
    // Encodes rows of f32, f16 or bf16 at any address into tiles begin..end of `to`.
    Fit (*encode)(const MatrixRef& to, const MatrixRef& from, int64_t begin, int64_t end);
};

// Null where the compiler's target lacks the instruction set.
const PackedLevel* packed_scalar();
const PackedLevel* packed_avx2();
const PackedLevel* packed_avxvnni();
const PackedLevel* packed_avx512vnni();
const PackedLevel* packed_amx();
const PackedLevel* packed_neon();
const PackedLevel* packed_neondot();

// Static: these headers are compiled for several instruction sets, and a shared copy could be any of them.
static constexpr bool in_tiles(Format format) { return format >= Format::tiles_int8; }
static constexpr int head_bytes(Format f) {  // of a unit: scales, zeros and minimums
    return f == Format::tiles_mxfp4 ? TILE : f == Format::tiles_nested ? 3 * TILE : f == Format::tiles_uint4 ? 4 * TILE : 2 * TILE;
}
static constexpr int step_bytes(Format f) {  // of STEP inputs x TILE rows
    return TILE * STEP / 8 *
           (f == Format::tiles_int8                                                              ? 8
            : f == Format::tiles_int4 || f == Format::tiles_uint4 || f == Format::tiles_mxfp4    ? 4
            : f == Format::tiles_int3                                                            ? 3
            : f == Format::tiles_int2 || f == Format::tiles_nested                               ? 2
                                                                                                 : 1);
}
static inline int64_t tile_bytes(Format f, int64_t cols, int group) {
    return cols / group * (head_bytes(f) + group / STEP * step_bytes(f));
}
static inline int64_t row_bytes_in_tiles(const MatrixRef& w) {
    const Format extra = Format::tiles_sign;
    const int64_t bytes = tile_bytes(w.format, w.cols, w.group) + ((w.third != nullptr) + (w.fourth != nullptr)) * tile_bytes(extra, w.cols, w.group);
    return bytes / TILE + 1;
}

void packed_ffn(const FfnCall& call);
int64_t packed_scratch_bytes();
void packed_linears(const float* x, int64_t x_stride, int64_t rows, const std::vector<LinearJob>& jobs, int threads);

// codes: rows of int8, or of nibbles with the low one first; scales: 16 bits, for mxfp4 8, for uint4 16 and a minimum of 16.
void pack_tiles(const MatrixRef& to, const uint8_t* codes, const uint8_t* scales, int threads);
// from: rows of f32, f16 or bf16.
Fit quantise_tiles(const MatrixRef& to, const MatrixRef& from, int threads);

// One row in float32, what the planes' values add up to.
void unpack_row(const MatrixRef& w, int64_t row, float* out);

// Whether a level gives the scalar level's bits on a small matrix of every format.
bool agrees_with_scalar(const PackedLevel& level);

}  // namespace moestro
