#include <array>
#include <cstring>

#include "kernels.hpp"
#include "level.hpp"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moestro {

#if defined(__x86_64__)
namespace {

// Polynomials over two elements, the highest power in the lowest bit, as CRC-32 has them.
constexpr uint32_t POLY = 0xEDB88320u;

constexpr uint32_t times_x(uint32_t value) { return (value >> 1) ^ (value & 1 ? POLY : 0); }

// x^n modulo the polynomial, as a factor that a carry-less product of 64 bits takes: the product then is value * x^(n + 32).
constexpr uint64_t factor(int n) {
    uint32_t value = 0x80000000u;
    for (int i = 0; i < n; ++i) value = times_x(value);
    return static_cast<uint64_t>(value) << 1;
}

constexpr std::array<uint32_t, 256> table() {
    std::array<uint32_t, 256> out{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; ++bit) value = times_x(value);
        out[byte] = value;
    }
    return out;
}

constexpr std::array<uint32_t, 256> TABLE = table();

uint32_t bytewise(uint32_t state, const uint8_t* bytes, int64_t count) {
    for (int64_t i = 0; i < count; ++i) state = TABLE[(state ^ bytes[i]) & 255] ^ (state >> 8);
    return state;
}

// The block moved `bits` further from the end: its halves times x^bits, added to what lies there.
__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i block, __m128i factors, __m128i onto) {
    const __m128i low = _mm_clmulepi64_si128(block, factors, 0x00), high = _mm_clmulepi64_si128(block, factors, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), onto);
}

__attribute__((target("pclmul,sse4.1"))) uint32_t folded(uint32_t state, const uint8_t* bytes, int64_t count) {
    const auto load = [&](int64_t at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + at)); };
    constexpr int LANES = 4;  // products of one lane wait for each other
    const __m128i far = _mm_set_epi64x(factor(128 * LANES - 32), factor(128 * LANES + 32));
    const __m128i near = _mm_set_epi64x(factor(128 - 32), factor(128 + 32));
    __m128i lane[LANES];
    for (int i = 0; i < LANES; ++i) lane[i] = load(16 * i);
    lane[0] = _mm_xor_si128(lane[0], _mm_cvtsi32_si128(static_cast<int>(state)));
    int64_t at = 16 * LANES;
    for (; at + 16 * LANES <= count; at += 16 * LANES)
        for (int i = 0; i < LANES; ++i) lane[i] = fold(lane[i], far, load(at + 16 * i));
    for (int i = 1; i < LANES; ++i) lane[i] = fold(lane[i - 1], near, lane[i]);
    uint8_t rest[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), lane[LANES - 1]);
    return bytewise(bytewise(0, rest, 16), bytes + at, count - at);
}

}  // namespace

bool has_crc32() {
    return std::strcmp(current().name, "scalar") != 0 && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}

uint32_t crc32(const void* data, int64_t count, uint32_t before) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    return ~(count < 64 ? bytewise(~before, bytes, count) : folded(~before, bytes, count));
}
#else
bool has_crc32() { return false; }

uint32_t crc32(const void*, int64_t, uint32_t) { return 0; }
#endif

}  // namespace moestro
