// Where codes lie in a tile (see packed.py). Static, for it is compiled for several instruction sets.
#pragma once
#include <cstring>

#include "packed.hpp"

namespace moestro {
namespace {

constexpr int MOST = 128;  // inputs of a group

// Lays one row's codes of BITS bits: word w holds inputs 4 w ... of `per` runs of four, see packed.py.
template <int BITS>
inline void lay(const uint8_t* codes, int row, uint8_t* step) {
    constexpr int pairs = STEP / 8, joint = 4 / (BITS < 8 ? BITS : 4);  // of runs of four; how many go into one word
    uint32_t words[pairs];
    for (int i = 0; i < pairs; ++i) {
        uint64_t both;
        std::memcpy(&both, codes + 8 * i, 8);  // as it was written, and no wider: the compiler's vectors would wait for the stores
#if defined(__GNUC__)
        asm("" : "+r"(both));
#endif
        words[i] = static_cast<uint32_t>(BITS == 8 ? both : both | both >> (32 - BITS));
        if constexpr (BITS == 8) {
            const uint32_t second = static_cast<uint32_t>(both >> 32);
            std::memcpy(step + 4 * TILE * 2 * i + 4 * row, &words[i], 4);
            std::memcpy(step + 4 * TILE * (2 * i + 1) + 4 * row, &second, 4);
        }
    }
    if constexpr (BITS < 8)
        for (int w = 0; w < pairs / joint; ++w) {
            uint32_t joined = 0;
            for (int i = 0; i < joint; ++i) joined |= words[w * joint + i] << (2 * BITS * i);
            std::memcpy(step + 4 * TILE * w + 4 * row, &joined, 4);
        }
}

template <Format F>
inline void lay_step(const uint8_t* codes, int row, uint8_t* step) {
    if constexpr (F == Format::tiles_int8) {
        lay<8>(codes, row, step);
    } else if constexpr (F == Format::tiles_int4 || F == Format::tiles_uint4 || F == Format::tiles_mxfp4) {
        lay<4>(codes, row, step);
    } else if constexpr (F == Format::tiles_sign) {
        lay<1>(codes, row, step);
    } else if constexpr (F == Format::tiles_int3) {
        uint8_t low[STEP], high[STEP];
        for (int i = 0; i < STEP; ++i) low[i] = codes[i] & 3, high[i] = codes[i] >> 2;
        lay<2>(low, row, step);
        lay<1>(high, row, step + 8 * TILE);
    } else {
        lay<2>(codes, row, step);
    }
}

template <Format F>
inline void lay_unit(int group, const uint8_t* codes, const void* scale, int row, uint8_t* unit) {
    constexpr int bytes = F == Format::tiles_mxfp4 ? 1 : 2;
    std::memcpy(unit + bytes * row, scale, bytes);
    for (int i = 0; i < group / STEP; ++i) lay_step<F>(codes + i * STEP, row, unit + head_bytes(F) + i * step_bytes(F));
}

}  // namespace
}  // namespace moestro
