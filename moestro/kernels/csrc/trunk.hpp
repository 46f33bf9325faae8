// Kernels of the decoder around the experts: plain pointers, sizes and strides (in bytes unless said otherwise).
#pragma once
#include <cstdint>
#include <vector>

#include "attention.hpp"
#include "ffn.hpp"

namespace moestro {

Scratch& own_scratch();        // the calling thread's, made at its first use
int threads_for(int wanted);   // 0: as many as this process may use

struct LinearJob {
    const MatrixRef* weight;
    float* out;
    int64_t out_stride;
    const float* bias;  // or null
};
// out[r] = weight x[r] + bias for every job; all jobs share the rows.
void linears(const float* x, int64_t x_stride, int64_t rows, const std::vector<LinearJob>& jobs, int threads);

struct Rows3 {  // [tokens, heads, width] float, the last axis contiguous
    char* data;
    int64_t token_stride, head_stride;
    float* at(int64_t token, int64_t head) const {
        return reinterpret_cast<float*>(data + token * token_stride + head * head_stride);
    }
};
// out = x / sqrt(mean x^2 + eps) * (weight + shift); when y is given, first x += scale * y.
void rms_norm(Rows3 x, const Rows3* y, float scale, const float* weight, float eps, float shift, Rows3 out, int64_t tokens,
              int64_t heads, int64_t width);
// Turns pairs of dimensions of x, which begins at the first rotated dimension, by the first `half` columns of the tables.
void rotate(Rows3 x, const char* cos, int64_t cos_stride, const char* sin, int64_t sin_stride, int64_t tokens, int64_t heads,
            int64_t half, bool interleaved);
void softmax(const char* x, int64_t stride, float* out, int64_t rows, int64_t width);
void sigmoid(const char* x, int64_t stride, float* out, int64_t rows, int64_t width);

struct AttendCall {
    Rows3 q, out;
    Cache keys, values;
    int64_t tokens, heads, shared;  // `shared` heads of keys and values
    const int64_t* lengths;
    float scale;
    int64_t window;      // 0: all
    const float* sinks;  // or null
    float softcap;       // 0: none
    int threads;
};
void attend(const AttendCall& call);
int64_t attend_work(const AttendCall& call);  // multiply-adds, about

}  // namespace moestro
