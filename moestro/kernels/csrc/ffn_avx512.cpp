// AVX-512 (F, BW, VL, DQ): sixteen lanes. Compiled with those flags, so nothing here may be shared with other files.
#include "ffn.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

namespace moestro {
namespace {

struct V {
    static constexpr int LANES = 16;
    static constexpr int TOKENS = 6;  // 4 x 6 sums, 6 inputs and 1 weight of 32 registers
    __m512 v;

    static V zero() { return {_mm512_setzero_ps()}; }
    static V set(float s) { return {_mm512_set1_ps(s)}; }
    static V load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
    static float half(uint16_t h) { return _cvtsh_ss(h); }
    static V load_f16(const uint8_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
    static V load_bf16(const uint8_t* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
    }
    static V load_int8(const uint8_t* p) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
    }
    static __m512i nibbles(const uint8_t* p) {
        int32_t words[2];
        __builtin_memcpy(words, p, 8);
        const __m512i both =
            _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set1_epi32(words[0])), _mm256_set1_epi32(words[1]), 1);
        const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        return _mm512_and_si512(_mm512_srlv_epi32(both, shifts), _mm512_set1_epi32(15));
    }
    // q * s - 8 s in one rounding is exactly (q - 8) * s rounded.
    static V scaled_int4(const uint8_t* p, V by, V offset) {
        return {_mm512_fmadd_ps(_mm512_cvtepi32_ps(nibbles(p)), by.v, offset.v)};
    }
    static V scaled_uint4(const uint8_t* p, V by, V offset) { return scaled_int4(p, by, offset); }
    static V mxfp4_table(float scale) {
        return mul({_mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6)}, set(scale));
    }
    static V scaled_mxfp4(const uint8_t* p, V table) { return {_mm512_permutexvar_ps(nibbles(p), table.v)}; }
    static V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
    static V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
    static V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
    static V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
    static V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
    static V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
    static V round(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    static V power_of_two(V n) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
    }
    static __m256 halves(V a) { return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)); }
    static void sum4(V a, V b, V c, V d, float* out) {
        const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(halves(a), halves(b)), _mm256_hadd_ps(halves(c), halves(d)));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
    }
    static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace
}  // namespace moestro

#include "attention_tile.hpp"

namespace moestro {
const FfnLevel* ffn_avx512() {
    static const FfnLevel level{"avx512", product, activate, soften, blend, nullptr};
    return &level;
}
}  // namespace moestro
#else
namespace moestro {
const FfnLevel* ffn_avx512() { return nullptr; }
}  // namespace moestro
#endif
