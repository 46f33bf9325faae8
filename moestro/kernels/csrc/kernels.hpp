// The remaining kernels: plain pointers, sizes and strides.
#pragma once
#include <cstdint>

namespace moestro {

// y[t] = sum in slot order of weight * row over the pairs of token t; zeros without pairs.
void combine(const float* out, const int64_t* token, const int64_t* slot, const float* weight, float* y, int64_t pairs,
             int64_t tokens, int64_t width, int64_t slots, int threads);

// The k largest of each row, descending, ties to the lower id, not-a-number last.
void topk(const float* scores, int64_t tokens, int64_t experts, int64_t k, int64_t* ids, float* values);

// Counting sort of the slots with id >= 0 by expert; starts has num_experts + 1 places.
void sort_pairs(const int64_t* experts, const float* weights, int64_t* token, int64_t* slot, int64_t* expert, float* weight,
                int64_t* starts, int64_t tokens, int64_t slots, int64_t num_experts);

void to_f32(const uint16_t* values, float* out, int64_t count, bool half, int threads);
void to_bf16(const float* values, uint16_t* out, int64_t count, int threads);

// out[c][r] = in[r][c * step]; row stride in bytes, items of 1, 2 or 4 bytes.
void transpose(const void* in, int64_t stride, int64_t step, int64_t rows, int64_t cols, int item, void* out, int threads);

// Gives these whole pages their memory, as a first write to each would; false where the system cannot.
bool populate(void* buffer, int64_t bytes);

// CRC-32 as in zlib; only to be called where has_crc32().
bool has_crc32();
uint32_t crc32(const void* data, int64_t count, uint32_t before);

// Bytes per second of the best pass over the buffer within about `seconds`.
double read_bandwidth(const void* buffer, int64_t bytes, double seconds, int threads);

}  // namespace moestro
