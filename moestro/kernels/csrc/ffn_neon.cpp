// NEON on 64-bit Arm: eight lanes in two registers.
#include "ffn.hpp"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace moestro {
namespace {

struct V {
    static constexpr int LANES = 8;
    static constexpr int TOKENS = 3;  // 4 x 3 sums, 3 inputs and 1 weight are 32 registers
    float32x4_t a, b;

    static V set(float s) { return {vdupq_n_f32(s), vdupq_n_f32(s)}; }
    static V zero() { return set(0.0f); }
    static V load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
    static void store(float* p, V x) { vst1q_f32(p, x.a), vst1q_f32(p + 4, x.b); }
    static float half(uint16_t h) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0); }
    static uint16x8_t shorts(const uint8_t* p) { return vreinterpretq_u16_u8(vld1q_u8(p)); }
    static V load_f16(const uint8_t* p) {
        const float16x8_t h = vreinterpretq_f16_u16(shorts(p));
        return {vcvt_f32_f16(vget_low_f16(h)), vcvt_f32_f16(vget_high_f16(h))};
    }
    static V load_bf16(const uint8_t* p) {
        const uint16x8_t h = shorts(p);
        return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)), vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(h), 16))};
    }
    static V of(int8x8_t q) {
        const int16x8_t wide = vmovl_s8(q);
        return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))};
    }
    static V load_int8(const uint8_t* p) { return of(vreinterpret_s8_u8(vld1_u8(p))); }
    static uint8x8_t nibbles(const uint8_t* p) {
        uint32_t word;
        __builtin_memcpy(&word, p, 4);
        const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(word));
        return vzip1_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4));
    }
    static V scaled_int4(const uint8_t* p, V by, V) {
        return mul(of(vsub_s8(vreinterpret_s8_u8(nibbles(p)), vdup_n_s8(8))), by);
    }
    static V scaled_uint4(const uint8_t* p, V by, V offset) { return fma(of(vreinterpret_s8_u8(nibbles(p))), by, offset); }
    static V mxfp4_table(float scale) { return set(0.5f * scale); }
    static V scaled_mxfp4(const uint8_t* p, V half) {  // twice the value fits a byte; the sign of zero does not matter here
        static const int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
        return mul(of(vqtbl1_s8(vld1q_s8(twice), nibbles(p))), half);
    }
    static V fma(V x, V y, V z) { return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
    static V add(V x, V y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
    static V sub(V x, V y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
    static V mul(V x, V y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
    static V div(V x, V y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
    static V min(V x, V y) { return {vminq_f32(x.a, y.a), vminq_f32(x.b, y.b)}; }
    static V max(V x, V y) { return {vmaxq_f32(x.a, y.a), vmaxq_f32(x.b, y.b)}; }
    static V round(V x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b)}; }
    static float32x4_t power(float32x4_t n) {
        return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
    }
    static V power_of_two(V n) { return {power(n.a), power(n.b)}; }
    static void sum4(V x, V y, V z, V w, float* out) {
        const float32x4_t low = vpaddq_f32(vpaddq_f32(x.a, y.a), vpaddq_f32(z.a, w.a));
        const float32x4_t high = vpaddq_f32(vpaddq_f32(x.b, y.b), vpaddq_f32(z.b, w.b));
        vst1q_f32(out, vaddq_f32(low, high));
    }
    static void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
};

}  // namespace
}  // namespace moestro

#include "attention_tile.hpp"

namespace moestro {
const FfnLevel* ffn_neon() {
    static const FfnLevel level{"neon", product, activate, soften, blend, nullptr};
    return &level;
}
}  // namespace moestro
#else
namespace moestro {
const FfnLevel* ffn_neon() { return nullptr; }
}  // namespace moestro
#endif
