// Packed tiles with AVX2: eight rows in a register. Compiled with that flag, so nothing here may be shared with other files.
#include "packed.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "packed_x86.hpp"

namespace moestro {
namespace {

struct D : X86 {
    static constexpr int INT8_ZERO = 0;
    static constexpr int ROWS = 2;  // rows multiplied together

    // Otherwise the compiler forms all products before it adds any, and has no registers for them: 1.5 times slower.
    static void pin(__m256i& sum) { asm("" : "+x"(sum)); }

    // Pairs of products of codes up to LARGEST fit 16 bits, and so do the sums of 4 pairs, or of 8 where `whole`.
    template <int LARGEST>
    struct Sum {
        static_assert(LARGEST * 127 * 2 * 4 < 32768);
        static constexpr bool whole = LARGEST * 127 * 2 * 8 < 32768;
        __m256i pairs[2];
        void add(int j, Bytes w, Bytes a) {
            const __m256i found = _mm256_maddubs_epi16(w, a);
            __m256i& to = pairs[whole ? 0 : j / 4];
            to = j % 4 == 0 && (j == 0 || !whole) ? found : _mm256_add_epi16(to, found);
            pin(to);
        }
        Ints total() const {
            const __m256i ones = _mm256_set1_epi16(1);
            if constexpr (whole) return _mm256_madd_epi16(pairs[0], ones);
            return _mm256_add_epi32(_mm256_madd_epi16(pairs[0], ones), _mm256_madd_epi16(pairs[1], ones));
        }
    };
};

// Weights with signs: the sign goes to the activation; a pair is at most 2 x 127 x 127.
template <>
struct D::Sum<-1> {
    __m256i sum;
    void add(int j, Bytes w, Bytes a) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
        const __m256i found = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        sum = j == 0 ? found : _mm256_add_epi32(sum, found);
        pin(sum);
    }
    Ints total() const { return sum; }
};

}  // namespace
}  // namespace moestro

#include "encode_tile.hpp"
#include "packed_tile.hpp"

namespace moestro {
const PackedLevel* packed_avx2() {
    static const PackedLevel level{"avx2", product, round_x86, encode_tiles};
    return &level;
}
}  // namespace moestro
#else
namespace moestro {
const PackedLevel* packed_avx2() { return nullptr; }
}  // namespace moestro
#endif
