// What the 256-bit levels of packed tiles share: all but the dot product.
#pragma once
#include <immintrin.h>

#include "packed.hpp"

namespace moestro {
namespace {

struct X86 {
    static constexpr int LANES = 8;
    using Bytes = __m256i;
    using Ints = __m256i;
    using Floats = __m256;

    static Bytes load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Bytes broadcast(const int8_t* p) {
        int32_t four;
        __builtin_memcpy(&four, p, 4);
        return _mm256_set1_epi32(four);
    }
    static Bytes bits(Bytes x, int shift, int mask) {
        return _mm256_and_si256(shift ? _mm256_srli_epi16(x, shift) : x, _mm256_set1_epi8(static_cast<char>(mask)));
    }
    static Bytes doubled(Bytes x, int times) { return _mm256_slli_epi16(x, times); }
    static Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
    static Bytes mxfp4(Bytes code) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0)), code);
    }
    static Ints set(int32_t s) { return _mm256_set1_epi32(s); }
    static Ints wide(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
    static Ints minus(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
    static Ints times(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
    static Ints left(Ints a, int by) { return _mm256_slli_epi32(a, by); }
    static Floats to_float(Ints a) { return _mm256_cvtepi32_ps(a); }
    static Floats set(float s) { return _mm256_set1_ps(s); }
    static Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
    static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static Floats halves(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static Floats half_powers(const uint8_t* p) {
        const __m256i e = wide(p), one = _mm256_set1_epi32(1);
        const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, one), 23);
        const __m256i tiny = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
        const __m256i bits = _mm256_blendv_epi8(tiny, normal, _mm256_cmpgt_epi32(e, one));
        const __m256i none = _mm256_cmpeq_epi32(e, _mm256_set1_epi32(255));
        return _mm256_castsi256_ps(_mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000), none));
    }
    static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
};

void round_x86(const float* x, int64_t blocks, int8_t* codes, float* scales, int32_t* sums, int64_t stride) {
    for (int64_t b = 0; b < blocks; ++b, x += STEP, codes += stride * STEP, scales += stride, sums += stride) {
        __m256 v[4];
        __m256i top = _mm256_setzero_si256();  // of the sizes as bit patterns: infinities and not-a-number are above every number
        for (int i = 0; i < 4; ++i) {
            v[i] = _mm256_loadu_ps(x + 8 * i);
            top = _mm256_max_epu32(top, _mm256_and_si256(_mm256_castps_si256(v[i]), _mm256_set1_epi32(0x7fffffff)));
        }
        __m128i four = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
        four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
        four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1));
        const bool finite = static_cast<uint32_t>(_mm_cvtsi128_si32(four)) < 0x7f800000u;
        const float scale = _mm_cvtss_f32(_mm_castsi128_ps(four)) / 127.0f;
        auto* to = reinterpret_cast<__m256i*>(codes);
        if (!finite || !(scale > 0)) {
            _mm256_storeu_si256(to, _mm256_setzero_si256());
            *scales = finite ? 0.0f : __builtin_nanf("");
            *sums = 0;
            continue;
        }
        const __m256 by = _mm256_set1_ps(scale);
        __m256i whole[4];
        for (int i = 0; i < 4; ++i) whole[i] = _mm256_cvtps_epi32(_mm256_div_ps(v[i], by));
        const __m256i sum = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i found = _mm256_max_epi8(_mm256_permutevar8x32_epi32(sum, order), _mm256_set1_epi8(-127));
        _mm256_storeu_si256(to, found);
        *scales = scale;
        const __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), found), _mm256_set1_epi16(1));
        __m128i rest = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        rest = _mm_add_epi32(rest, _mm_shuffle_epi32(rest, 0x4e));
        rest = _mm_add_epi32(rest, _mm_shuffle_epi32(rest, 0xb1));
        *sums = _mm_cvtsi128_si32(rest);
    }
}

}  // namespace
}  // namespace moestro
