// Packed tiles with AVX-512 and its VNNI: all sixteen rows in a register.
#include "packed.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include "packed_512.hpp"
#include "packed_tile.hpp"

namespace moestro {
const PackedLevel* packed_avx512vnni() {
    static const PackedLevel level{"avx512vnni", product, round_x86, packed_avx2()->encode};
    return &level;
}
}  // namespace moestro
#else
namespace moestro {
const PackedLevel* packed_avx512vnni() { return nullptr; }
}  // namespace moestro
#endif
