// Portable C++: eight lanes in an array. Multiply and add are rounded separately, as plain hardware does.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "ffn.hpp"

namespace moestro {
namespace {

struct V {
    static constexpr int LANES = 8;   // a divisor of 32
    static constexpr int TOKENS = 2;  // tokens of a register tile
    float v[LANES];

    template <class Op>
    static V each(Op op) {
        V out;
        for (int i = 0; i < LANES; ++i) out.v[i] = op(i);
        return out;
    }
    static V set(float s) { return each([=](int) { return s; }); }
    static V zero() { return set(0.0f); }
    static V load(const float* p) {
        V out;
        std::memcpy(out.v, p, sizeof out.v);
        return out;
    }
    static void store(float* p, const V& a) { std::memcpy(p, a.v, sizeof a.v); }
    static float half(uint16_t h) {
        const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
        uint32_t bits;
        if (rest >= 0x7c00u) {
            bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
        } else if (rest >= 0x400u) {
            bits = sign | ((rest << 13) + 0x38000000u);
        } else {  // subnormal: a multiple of 2^-24
            const float tiny = static_cast<float>(rest) * 0x1p-24f;
            return sign ? -tiny : tiny;
        }
        float out;
        std::memcpy(&out, &bits, 4);
        return out;
    }
    static V load_f16(const uint8_t* p) {
        uint16_t h[LANES];
        std::memcpy(h, p, sizeof h);
        return each([&](int i) { return half(h[i]); });
    }
    static V load_bf16(const uint8_t* p) {
        uint16_t h[LANES];
        std::memcpy(h, p, sizeof h);
        V out;
        for (int i = 0; i < LANES; ++i) {
            const uint32_t bits = static_cast<uint32_t>(h[i]) << 16;
            std::memcpy(&out.v[i], &bits, 4);
        }
        return out;
    }
    static V load_int8(const uint8_t* p) {
        return each([=](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
    }
    static int nibble(const uint8_t* p, int i) { return i % 2 ? p[i / 2] >> 4 : p[i / 2] & 15; }
    static V scaled_int4(const uint8_t* p, const V& by, const V&) {
        return each([&](int i) { return static_cast<float>(nibble(p, i) - 8) * by.v[i]; });
    }
    static V scaled_uint4(const uint8_t* p, const V& by, const V& offset) {
        return each([&](int i) { return std::fma(static_cast<float>(nibble(p, i)), by.v[i], offset.v[i]); });
    }
    static V mxfp4_table(float scale) { return set(scale); }
    static V scaled_mxfp4(const uint8_t* p, const V& by) {
        static const float table[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6};
        return each([&](int i) { return table[nibble(p, i)] * by.v[i]; });
    }
    static V fma(const V& a, const V& b, const V& c) {
        return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
    }
    static V add(const V& a, const V& b) {
        return each([&](int i) { return a.v[i] + b.v[i]; });
    }
    static V sub(const V& a, const V& b) {
        return each([&](int i) { return a.v[i] - b.v[i]; });
    }
    static V mul(const V& a, const V& b) {
        return each([&](int i) { return a.v[i] * b.v[i]; });
    }
    static V div(const V& a, const V& b) {
        return each([&](int i) { return a.v[i] / b.v[i]; });
    }
    // min and max give the second operand when either is not-a-number, as on x86.
    static V min(const V& a, const V& b) {
        return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
    }
    static V max(const V& a, const V& b) {
        return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
    }
    static V round(const V& a) {
        return each([&](int i) { return std::nearbyintf(a.v[i]); });
    }
    static V power_of_two(const V& n) {  // n: whole numbers in -126..127
        V out;
        for (int i = 0; i < LANES; ++i) {
            const uint32_t bits = n.v[i] == n.v[i] ? static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23 : 0x7fc00000u;
            std::memcpy(&out.v[i], &bits, 4);
        }
        return out;
    }
    static float sum(const V& a) { return ((a.v[0] + a.v[1]) + (a.v[2] + a.v[3])) + ((a.v[4] + a.v[5]) + (a.v[6] + a.v[7])); }
    static void sum4(const V& a, const V& b, const V& c, const V& d, float* out) {
        out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
    }
    static void prefetch(const uint8_t*) {}
};

}  // namespace
}  // namespace moestro

#include "attention_tile.hpp"

namespace moestro {
const FfnLevel* ffn_scalar() {
    static const FfnLevel level{"scalar", product, activate, soften, blend, nullptr};
    return &level;
}
}  // namespace moestro
