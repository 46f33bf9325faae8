// What the Arm levels of packed tiles share: all but the dot product. Four rows in a register.
#pragma once
#include <arm_neon.h>

#include "packed.hpp"

namespace moestro {
namespace {

struct Arm {
    static constexpr int LANES = 4;
    static constexpr int INT8_ZERO = 0;
    static constexpr int ROWS = 2;  // rows multiplied together
    using Bytes = uint8x16_t;
    using Ints = int32x4_t;
    using Floats = float32x4_t;

    static Bytes load(const uint8_t* p) { return vld1q_u8(p); }
    static Bytes broadcast(const int8_t* p) {
        int32_t four;
        __builtin_memcpy(&four, p, 4);
        return vreinterpretq_u8_s32(vdupq_n_s32(four));
    }
    static Bytes bits(Bytes x, int shift, int mask) {
        return vandq_u8(vshlq_u8(x, vdupq_n_s8(static_cast<int8_t>(-shift))), vdupq_n_u8(static_cast<uint8_t>(mask)));
    }
    static Bytes doubled(Bytes x, int times) { return vshlq_u8(x, vdupq_n_s8(static_cast<int8_t>(times))); }
    static Bytes either(Bytes a, Bytes b) { return vorrq_u8(a, b); }
    static Bytes mxfp4(Bytes code) {
        static const uint8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
        return vqtbl1q_u8(vld1q_u8(table), code);
    }
    static Ints set(int32_t s) { return vdupq_n_s32(s); }
    static Ints wide(const uint8_t* p) {
        uint32_t four;
        __builtin_memcpy(&four, p, 4);
        return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
    }
    static Ints minus(Ints a, Ints b) { return vsubq_s32(a, b); }
    static Ints times(Ints a, Ints b) { return vmulq_s32(a, b); }
    static Ints left(Ints a, int by) { return vshlq_s32(a, vdupq_n_s32(by)); }
    static Floats to_float(Ints a) { return vcvtq_f32_s32(a); }
    static Floats set(float s) { return vdupq_n_f32(s); }
    static Floats load_floats(const float* p) { return vld1q_f32(p); }
    static void store(float* p, Floats a) { vst1q_f32(p, a); }
    static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    static Floats halves(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
    static Floats half_powers(const uint8_t* p) {  // as in packed_scalar.cpp
        const int32x4_t e = wide(p), one = vdupq_n_s32(1);
        const uint32x4_t normal = vreinterpretq_u32_s32(vshlq_n_s32(vsubq_s32(e, one), 23));
        const uint32x4_t tiny = vshlq_u32(vdupq_n_u32(0x00200000), e);
        const uint32x4_t bits = vbslq_u32(vcgtq_s32(e, one), normal, tiny);
        return vreinterpretq_f32_u32(vbslq_u32(vceqq_s32(e, vdupq_n_s32(255)), vdupq_n_u32(0x7fc00000), bits));
    }
    static void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
};

void round_arm(const float* x, int64_t blocks, int8_t* codes, float* scales, int32_t* sums, int64_t stride) {
    for (int64_t b = 0; b < blocks; ++b, x += STEP, codes += stride * STEP, scales += stride, sums += stride) {
        uint32x4_t top = vdupq_n_u32(0);  // of the sizes as bit patterns: infinities and not-a-number are above every number
        for (int i = 0; i < STEP; i += 4)
            top = vmaxq_u32(top, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), vdupq_n_u32(0x7fffffff)));
        const uint32_t bits = vmaxvq_u32(top);
        float size;
        __builtin_memcpy(&size, &bits, 4);
        const bool finite = bits < 0x7f800000u;
        const float scale = size / 127.0f;
        if (!finite || !(scale > 0)) {
            for (int i = 0; i < STEP; ++i) codes[i] = 0;
            *scales = finite ? 0.0f : __builtin_nanf("");
            *sums = 0;
            continue;
        }
        const float32x4_t by = vdupq_n_f32(scale);
        int32_t sum = 0;
        for (int i = 0; i < STEP; i += 4) {
            int32x4_t whole = vcvtnq_s32_f32(vdivq_f32(vld1q_f32(x + i), by));
            whole = vmaxq_s32(vdupq_n_s32(-127), vminq_s32(vdupq_n_s32(127), whole));
            for (int k = 0; k < 4; ++k) codes[i + k] = static_cast<int8_t>(whole[k]);
            sum += vaddvq_s32(whole);
        }
        *scales = scale;
        *sums = sum;
    }
}

}  // namespace
}  // namespace moestro
