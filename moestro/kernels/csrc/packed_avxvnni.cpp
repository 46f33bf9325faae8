// Packed tiles with AVX2 and its VNNI: products of four codes are added to 32 bits at once.
#include "packed.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__AVXVNNI__)
#include "packed_x86.hpp"

namespace moestro {
namespace {

struct D : X86 {
    static constexpr int INT8_ZERO = 128;  // codes without signs are wanted: what Sum<-1> adds to each weight
    static constexpr int ROWS = 2;         // rows multiplied together

    template <int LARGEST>  // no code is larger; -1: codes with signs
    struct Sum {
        __m256i sums[2];  // two, for one addition waits for the one before it
        void add(int j, Bytes w, Bytes a) {
            if (LARGEST == -1) w = _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80)));
            sums[j % 2] = _mm256_dpbusd_avx_epi32(j < 2 ? _mm256_setzero_si256() : sums[j % 2], w, a);
        }
        Ints total() const { return _mm256_add_epi32(sums[0], sums[1]); }
    };
};

}  // namespace
}  // namespace moestro

#include "packed_tile.hpp"

namespace moestro {
const PackedLevel* packed_avxvnni() {
    static const PackedLevel level{"avxvnni", product, round_x86, packed_avx2()->encode};
    return &level;
}
}  // namespace moestro
#else
namespace moestro {
const PackedLevel* packed_avxvnni() { return nullptr; }
}  // namespace moestro
#endif
