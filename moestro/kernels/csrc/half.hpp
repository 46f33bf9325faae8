// IEEE half precision and bfloat16 in portable code. Static, for it is compiled for several instruction sets.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace moestro {

static inline float from_half(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
    // Normal numbers move their exponent; subnormal ones are made by a subtraction that is exact; no branch, so it vectorises.
    const uint32_t normal = (rest << 13) + (rest >= 0x7c00u ? 0x70000000u : 0x38000000u);
    const uint32_t shifted = (rest << 13) + 0x38800000u;
    float tiny, base;
    const uint32_t base_bits = 0x38800000u;
    std::memcpy(&tiny, &shifted, 4);
    std::memcpy(&base, &base_bits, 4);
    tiny -= base;
    uint32_t tiny_bits;
    std::memcpy(&tiny_bits, &tiny, 4);
    const uint32_t bits = sign | (rest < 0x400u ? tiny_bits : normal);
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

static inline uint16_t to_half(float value) {  // nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return sign | 0x7e00u;
    if (rest >= 0x477ff000u) return sign | 0x7c00u;
    if (rest < 0x38800000u)  // a multiple of 2^-24
        return sign | static_cast<uint16_t>(std::nearbyintf(std::fabs(value) * 0x1p24f));
    return sign | static_cast<uint16_t>((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13);
}

static inline uint16_t to_bf16_bits(float value) {  // nearest, ties to even; not-a-number stays one
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // no branch, so it vectorises
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}

}  // namespace moestro
