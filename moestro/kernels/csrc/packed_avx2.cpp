// Packed tiles with AVX2: eight rows in a register. Compiled with that flag, so nothing here may be shared with other files.
#include "packed.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "packed_x86.hpp"

namespace moestro {
namespace {

struct D : X86 {
    static constexpr int INT8_ZERO = 0;

    // Pairs of products fit 16 bits, and so do the sums of as many pairs as LARGEST allows.
    template <int LARGEST>
    static Ints dot(const Bytes* w, const Bytes* a) {
        static_assert(LARGEST * 127 * 2 * 4 < 32768);
        const __m256i ones = _mm256_set1_epi16(1);
        const auto four = [&](int j) {
            const __m256i s = _mm256_add_epi16(_mm256_maddubs_epi16(w[j], a[j]), _mm256_maddubs_epi16(w[j + 1], a[j + 1]));
            return _mm256_add_epi16(s, _mm256_add_epi16(_mm256_maddubs_epi16(w[j + 2], a[j + 2]), _mm256_maddubs_epi16(w[j + 3], a[j + 3])));
        };
        if constexpr (LARGEST * 127 * 2 * 8 < 32768) return _mm256_madd_epi16(_mm256_add_epi16(four(0), four(4)), ones);
        return _mm256_add_epi32(_mm256_madd_epi16(four(0), ones), _mm256_madd_epi16(four(4), ones));
    }
    // The sign of each weight goes to its activation; a pair is at most 2 x 127 x 127.
    static Ints dot_signed(const Bytes* w, const Bytes* a) {
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int j = 0; j < STEP / 4; ++j) {
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w[j]), _mm256_sign_epi8(a[j], w[j]));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
        }
        return sum;
    }
};

}  // namespace
}  // namespace moestro

#include "packed_tile.hpp"

namespace moestro {
const PackedLevel* packed_avx2() {
    static const PackedLevel level{"avx2", product, round_x86};
    return &level;
}
}  // namespace moestro
#else
namespace moestro {
const PackedLevel* packed_avx2() { return nullptr; }
}  // namespace moestro
#endif
