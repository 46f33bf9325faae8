// Packed tiles with NEON alone: products in 16 bits, added pairwise to 32.
#include "packed.hpp"

#if defined(__aarch64__)
#include "packed_arm.hpp"

namespace moestro {
namespace {

struct D : Arm {
    template <int LARGEST>  // no code is larger; all fit a byte with its sign
    struct Sum {
        int32x4_t sums[2];  // of the lower and the higher two rows, each row in two lanes
        void add(int j, Bytes w, Bytes a) {
            const int8x16_t left = vreinterpretq_s8_u8(w), right = vreinterpretq_s8_u8(a);
            const int16x8_t low = vmull_s8(vget_low_s8(left), vget_low_s8(right)), high = vmull_high_s8(left, right);
            sums[0] = j == 0 ? vpaddlq_s16(low) : vpadalq_s16(sums[0], low);
            sums[1] = j == 0 ? vpaddlq_s16(high) : vpadalq_s16(sums[1], high);
        }
        Ints total() const { return vpaddq_s32(sums[0], sums[1]); }
    };
};

}  // namespace
}  // namespace moestro

#include "packed_tile.hpp"

namespace moestro {
const PackedLevel* packed_neon() {
    static const PackedLevel level{"neon", product, round_arm, packed_scalar()->encode};
    return &level;
}
}  // namespace moestro
#else
namespace moestro {
const PackedLevel* packed_neon() { return nullptr; }
}  // namespace moestro
#endif
