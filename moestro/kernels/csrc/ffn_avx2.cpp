// AVX2 with FMA and F16C: eight lanes. Compiled with those flags, so nothing here may be shared with other files.
#include "ffn.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace moestro {
namespace {

struct V {
    static constexpr int LANES = 8;
    static constexpr int TOKENS = 3;  // 4 x 3 sums, 3 inputs and 1 weight fill the 16 registers
    __m256 v;

    static V zero() { return {_mm256_setzero_ps()}; }
    static V set(float s) { return {_mm256_set1_ps(s)}; }
    static V load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static void store(float* p, V a) { _mm256_storeu_ps(p, a.v); }
    static float half(uint16_t h) { return _cvtsh_ss(h); }
    static V load_f16(const uint8_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
    static V load_bf16(const uint8_t* p) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
    }
    static V load_int8(const uint8_t* p) {
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
    }
    static __m256i word(const uint8_t* p) {  // eight nibbles, in every lane
        int32_t bits;
        __builtin_memcpy(&bits, p, 4);
        return _mm256_set1_epi32(bits);
    }
    static __m256i shifted(const uint8_t* p) {  // nibble j in the low bits of lane j
        return _mm256_srlv_epi32(word(p), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    }
    // q * s - 8 s in one rounding is exactly (q - 8) * s rounded.
    static V scaled_int4(const uint8_t* p, V by, V offset) {
        const __m256i q = _mm256_and_si256(shifted(p), _mm256_set1_epi32(15));
        return {_mm256_fmadd_ps(_mm256_cvtepi32_ps(q), by.v, offset.v)};
    }
    static V scaled_uint4(const uint8_t* p, V by, V offset) { return scaled_int4(p, by, offset); }
    static V mxfp4_table(float scale) { return mul({_mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6)}, set(scale)); }
    static V scaled_mxfp4(const uint8_t* p, V table) {
        const __m256 sizes = _mm256_permutevar8x32_ps(table.v, shifted(p));  // looks at three bits
        const __m256i signs = _mm256_sllv_epi32(word(p), _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0));
        return {_mm256_xor_ps(sizes, _mm256_and_ps(_mm256_castsi256_ps(signs), _mm256_set1_ps(-0.0f)))};
    }
    static V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static V add(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
    static V sub(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
    static V mul(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
    static V div(V a, V b) { return {_mm256_div_ps(a.v, b.v)}; }
    static V min(V a, V b) { return {_mm256_min_ps(a.v, b.v)}; }
    static V max(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }
    static V round(V a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    static V power_of_two(V n) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
    }
    static void sum4(V a, V b, V c, V d, float* out) {
        const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
    }
    static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace
}  // namespace moestro

#include "attention_tile.hpp"

namespace moestro {
const FfnLevel* ffn_avx2() {
    static const FfnLevel level{"avx2", product, activate, soften, blend, nullptr};
    return &level;
}
}  // namespace moestro
#else
namespace moestro {
const FfnLevel* ffn_avx2() { return nullptr; }
}  // namespace moestro
#endif
