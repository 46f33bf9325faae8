// Packed tiles with NEON's dot product: products of four codes are added to 32 bits at once.
#include "packed.hpp"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include "packed_arm.hpp"

namespace moestro {
namespace {

struct D : Arm {
    template <int LARGEST>  // no code is larger; all fit a byte with its sign
    struct Sum {
        int32x4_t sum;
        void add(int j, Bytes w, Bytes a) {
            sum = vdotq_s32(j == 0 ? vdupq_n_s32(0) : sum, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(a));
        }
        Ints total() const { return sum; }
    };
};

}  // namespace
}  // namespace moestro

#include "packed_tile.hpp"

namespace moestro {
const PackedLevel* packed_neondot() {
    static const PackedLevel level{"neondot", product, round_arm, packed_scalar()->encode};
    return &level;
}
}  // namespace moestro
#else
namespace moestro {
const PackedLevel* packed_neondot() { return nullptr; }
}  // namespace moestro
#endif
