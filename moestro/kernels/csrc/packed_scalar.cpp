// Packed tiles in portable C++: 16 rows in an array.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "half.hpp"
#include "packed.hpp"

namespace moestro {
namespace {

struct D {
    static constexpr int LANES = 16;     // rows of a register, a divisor of TILE
    static constexpr int INT8_ZERO = 0;  // what Sum<-1> adds to each weight
    static constexpr int ROWS = 1;       // rows multiplied together
    struct Bytes {
        uint8_t v[4 * LANES];
    };
    struct Ints {
        int32_t v[LANES];
    };
    struct Floats {
        float v[LANES];
    };

    template <class Out, class Op>
    static Out each(Op op) {
        Out out;
        for (int i = 0; i < static_cast<int>(sizeof out.v / sizeof out.v[0]); ++i) out.v[i] = op(i);
        return out;
    }
    static Bytes load(const uint8_t* p) {
        Bytes out;
        std::memcpy(out.v, p, sizeof out.v);
        return out;
    }
    static Bytes broadcast(const int8_t* p) {  // four activations for every row
        Bytes out;
        for (int i = 0; i < LANES; ++i) std::memcpy(out.v + 4 * i, p, 4);
        return out;
    }
    static Bytes bits(const Bytes& x, int shift, int mask) {
        return each<Bytes>([&](int i) { return static_cast<uint8_t>(x.v[i] >> shift & mask); });
    }
    static Bytes doubled(const Bytes& x, int times) {
        return each<Bytes>([&](int i) { return static_cast<uint8_t>(x.v[i] << times); });
    }
    static Bytes either(const Bytes& a, const Bytes& b) {
        return each<Bytes>([&](int i) { return static_cast<uint8_t>(a.v[i] | b.v[i]); });
    }
    static Bytes mxfp4(const Bytes& code) {
        static const uint8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
        return each<Bytes>([&](int i) { return table[code.v[i]]; });
    }
    template <int LARGEST>  // no code is larger; -1: codes with signs
    struct Sum {
        Ints sum{};
        void add(int, const Bytes& w, const Bytes& a) {
            using Code = std::conditional_t<LARGEST == -1, int8_t, uint8_t>;
            for (int i = 0; i < 4 * LANES; ++i) sum.v[i / 4] += static_cast<Code>(w.v[i]) * static_cast<int8_t>(a.v[i]);
        }
        const Ints& total() const { return sum; }
    };

    static Ints set(int32_t s) { return each<Ints>([=](int) { return s; }); }
    static Ints wide(const uint8_t* p) { return each<Ints>([=](int i) { return p[i]; }); }
    static Ints minus(const Ints& a, const Ints& b) { return each<Ints>([&](int i) { return a.v[i] - b.v[i]; }); }
    static Ints times(const Ints& a, const Ints& b) { return each<Ints>([&](int i) { return a.v[i] * b.v[i]; }); }
    static Ints left(const Ints& a, int by) { return each<Ints>([&](int i) { return a.v[i] * (1 << by); }); }
    static Floats to_float(const Ints& a) { return each<Floats>([&](int i) { return static_cast<float>(a.v[i]); }); }
    static Floats set(float s) { return each<Floats>([=](int) { return s; }); }
    static Floats load_floats(const float* p) { return each<Floats>([=](int i) { return p[i]; }); }
    static void store(float* p, const Floats& a) { std::memcpy(p, a.v, sizeof a.v); }
    static Floats mul(const Floats& a, const Floats& b) { return each<Floats>([&](int i) { return a.v[i] * b.v[i]; }); }
    static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
        return each<Floats>([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
    }
    static Floats halves(const uint8_t* p) {
        return each<Floats>([=](int i) {
            uint16_t bits;
            std::memcpy(&bits, p + 2 * i, 2);
            return from_half(bits);
        });
    }
    static Floats half_powers(const uint8_t* p) {  // 2^(e - 128); 255 is not-a-number
        return each<Floats>([=](int i) {
            const uint32_t e = p[i], bits = e == 255 ? 0x7fc00000u : e >= 2 ? (e - 1) << 23 : 0x00200000u << e;
            float out;
            std::memcpy(&out, &bits, 4);
            return out;
        });
    }
    static void prefetch(const uint8_t*) {}
};

void round(const float* x, int64_t blocks, int8_t* codes, float* scales, int32_t* sums, int64_t stride) {
    for (int64_t b = 0; b < blocks; ++b, x += STEP, codes += stride * STEP, scales += stride, sums += stride) {
        uint32_t top = 0;  // of the sizes as bit patterns: infinities and not-a-number are above every number
        for (int i = 0; i < STEP; ++i) {
            uint32_t bits;
            std::memcpy(&bits, x + i, 4);
            bits &= 0x7fffffffu;
            top = bits > top ? bits : top;
        }
        float size;
        std::memcpy(&size, &top, 4);
        const float scale = size / 127.0f;
        const bool usable = top < 0x7f800000u && scale > 0;
        int32_t sum = 0;
        for (int i = 0; i < STEP; ++i) {
            float whole = usable ? std::nearbyintf(x[i] / scale) : 0.0f;
            whole = whole < -127.0f ? -127.0f : whole > 127.0f ? 127.0f : whole;
            codes[i] = static_cast<int8_t>(whole);
            sum += codes[i];
        }
        *scales = usable ? scale : top < 0x7f800000u ? 0.0f : std::nanf("");
        *sums = sum;
    }
}

}  // namespace
}  // namespace moestro

#include "encode_tile.hpp"
#include "packed_tile.hpp"

namespace moestro {
namespace {

template <Format F>
Ints codes_of(const Bytes& w, int input) {
    using Code = std::conditional_t<F == Format::tiles_int8, int8_t, uint8_t>;
    return D::each<Ints>([&](int i) { return static_cast<Code>(w.v[4 * i + input]); });
}

// A row of a tile: the product with each input alone.
template <Format F, int EXTRA>
void unpack(const MatrixRef& w, int64_t row, float* out) {
    using S = Streams<F, EXTRA>;
    S s(w, row / TILE);
    const Ints one = D::set(int32_t{1});
    const Floats by = D::set(1.0f), zero = D::set(0.0f);
    for (int64_t unit_number = 0; unit_number < w.cols / w.group; ++unit_number) {
        const Unit<F> unit(s.p);
        const Unit<S::SIGN> third(EXTRA > 0 ? s.q[0] : s.p), fourth(EXTRA > 1 ? s.q[1] : s.p);
        s.head();
        for (int step = 0; step < w.group / STEP; ++step, s.step())
            for (int j = 0; j < WORDS; ++j)
                for (int input = 0; input < 4; ++input) {
                    Floats value = unit.added(codes_of<F>(word<F>(s.p, 0, j), input), one, by, 0, zero);
                    if constexpr (EXTRA > 0) value = third.added(codes_of<S::SIGN>(word<S::SIGN>(s.q[0], 0, j), input), one, by, 0, value);
                    if constexpr (EXTRA > 1) value = fourth.added(codes_of<S::SIGN>(word<S::SIGN>(s.q[1], 0, j), input), one, by, 0, value);
                    *out++ = value.v[row % TILE];
                }
    }
}

}  // namespace

void unpack_row(const MatrixRef& w, int64_t row, float* out) {
    in_its_format(w, [&](auto kind) { unpack<decltype(kind)::format, decltype(kind)::extra>(w, row, out); });
}

const PackedLevel* packed_scalar() {
    static const PackedLevel level{"scalar", product, round, encode_tiles};
    return &level;
}
}  // namespace moestro
