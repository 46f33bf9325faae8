// Packed tiles in registers of 512 bits: all sixteen rows in one, products by AVX-512's VNNI.
#pragma once
#include "packed_x86.hpp"

namespace moestro {
namespace {

struct D {
    static constexpr int LANES = 16;
    static constexpr int INT8_ZERO = 128;  // codes without signs are wanted: what Sum<-1> adds to each weight
    static constexpr int ROWS = 4;         // rows multiplied together
    using Bytes = __m512i;
    using Ints = __m512i;
    using Floats = __m512;

    template <int LARGEST>  // no code is larger; -1: codes with signs
    struct Sum {
        __m512i sums[2];  // two, for one addition waits for the one before it
        void add(int j, Bytes w, Bytes a) {
            if (LARGEST == -1) w = _mm512_xor_si512(w, _mm512_set1_epi8(static_cast<char>(0x80)));
            sums[j % 2] = _mm512_dpbusd_epi32(j < 2 ? _mm512_setzero_si512() : sums[j % 2], w, a);
        }
        Ints total() const { return _mm512_add_epi32(sums[0], sums[1]); }
    };

    static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static Bytes broadcast(const int8_t* p) {
        int32_t four;
        __builtin_memcpy(&four, p, 4);
        return _mm512_set1_epi32(four);
    }
    static Bytes bits(Bytes x, int shift, int mask) {
        return _mm512_and_si512(shift ? _mm512_srli_epi16(x, static_cast<unsigned>(shift)) : x, _mm512_set1_epi8(static_cast<char>(mask)));
    }
    static Bytes doubled(Bytes x, int times) { return _mm512_slli_epi16(x, static_cast<unsigned>(times)); }
    static Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
    static Bytes mxfp4(Bytes code) {
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0)), code);
    }
    static Ints set(int32_t s) { return _mm512_set1_epi32(s); }
    static Ints wide(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static Ints minus(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
    static Ints times(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
    static Ints left(Ints a, int by) { return _mm512_slli_epi32(a, static_cast<unsigned>(by)); }
    static Floats to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
    static Floats set(float s) { return _mm512_set1_ps(s); }
    static Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats halves(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static Floats half_powers(const uint8_t* p) {  // as in packed_scalar.cpp
        const __m512i e = wide(p), one = _mm512_set1_epi32(1);
        const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, one), 23);
        const __m512i tiny = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
        const __m512i bits = _mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(e, one), tiny, normal);
        return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(255)), _mm512_set1_epi32(0x7fc00000)));
    }
    static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace
}  // namespace moestro
