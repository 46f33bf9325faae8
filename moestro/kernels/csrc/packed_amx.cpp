// Packed tiles with AMX, for many rows: a tile's step is laid out as the second operand of its products wants it, so one instruction
// multiplies 16 rows of activations by the 16 rows of a tile. Few rows stay with AVX-512 and its VNNI.
//
// Zeros are taken off the codes as they are unpacked, once for a bundle's rows; the sums are whole numbers, which AVX-512 adds by the
// law. This has run in an emulator only: neither its sizes nor its speed were ever measured.
#include "packed.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) && defined(__AMX_TILE__) && defined(__AMX_INT8__)
#include <algorithm>
#include <array>

#include "packed_512.hpp"
#include "packed_law.hpp"

namespace moestro {
namespace {

constexpr int FEW = 8;      // rows below which the processor's tiles would be filled too little
constexpr int TOKENS = 16;  // rows of activations multiplied together, at most
constexpr int CHUNK = 4;    // steps unpacked together; every group ends with one
constexpr int WIDTH = 64;   // bytes of a tile's row: 4 inputs or a sum of each of TILE rows

// What is at `p` must be in memory now: GCC's header does not say what these instructions read.
inline void written(const void* p) { __asm__ volatile("" ::"r"(p) : "memory"); }

// The processor's tiles of a thread: 0 activations, 1 and 2 weights, 3 and 4 sums. Taken for one call and given back, some dozens of
// nanoseconds, so that other threads are not switched to with 8 KB more to save.
class Taken {
public:
    explicit Taken(int rows) {
        struct alignas(64) {  // what ldtilecfg reads
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {STEP, WIDTH, WIDTH, WIDTH, WIDTH};
            uint8_t rows[16] = {};
        } shapes;
        for (int i : {0, 3, 4}) shapes.rows[i] = static_cast<uint8_t>(rows);
        for (int i : {1, 2}) shapes.rows[i] = STEP / 4;
        written(&shapes);
        _tile_loadconfig(&shapes);
    }
    ~Taken() { _tile_release(); }
    Taken(const Taken&) = delete;
    Taken& operator=(const Taken&) = delete;
};

// A chunk of one plane of a tile: codes as signed bytes, and their products with up to TOKENS rows of activations.
template <Format F>
struct alignas(64) Plane {
    static constexpr bool ODD = F == Format::tiles_int3 || F == Format::tiles_int2 || F == Format::tiles_sign;  // 2 u - zero
    static constexpr int ZERO = F == Format::tiles_int4    ? 8
                                : F == Format::tiles_mxfp4 ? 12
                                : F == Format::tiles_int3  ? 7
                                : F == Format::tiles_int2  ? 3
                                : F == Format::tiles_sign  ? 1
                                                           : 0;
    uint8_t codes[CHUNK][STEP * TILE];
    int32_t sums[CHUNK][TOKENS * TILE];
    Unit<F> units[CHUNK];

    void unpack(int i, const uint8_t* p) {
#pragma GCC unroll 8
        for (int j = 0; j < WORDS; ++j) {
            Bytes u = word<F>(p, 0, j);
            if (ODD) u = _mm512_add_epi8(u, u);
            if (ZERO) u = _mm512_sub_epi8(u, _mm512_set1_epi8(ZERO));
            _mm512_store_si512(codes[i] + j * WIDTH, u);
        }
    }
    Floats added(int i, int row, Ints total, Floats by, Floats so_far) const {
        Ints whole = _mm512_load_si512(sums[i] + row * TILE);
        if (F == Format::tiles_nested) whole = units[i].whole(whole, total, 0);  // its zeros need more than a byte
        return units[i].added_whole(whole, total, by, 0, so_far);
    }
};

// Step `i` of a plane of W tiles; the activations are loaded once for both.
template <int W, Format F>
inline void multiply(const int8_t* activations, int i, Plane<F>& first, Plane<F>& second) {
    _tile_loadd(0, activations, STEP);
    _tile_loadd(1, first.codes[i], WIDTH);
    _tile_zero(3);
    _tile_dpbssd(3, 0, 1);
    if (W > 1) {
        _tile_loadd(2, second.codes[i], WIDTH);
        _tile_zero(4);
        _tile_dpbssd(4, 0, 2);
        _tile_stored(4, second.sums[i], WIDTH);
    }
    _tile_stored(3, first.sums[i], WIDTH);
}

template <Format F, int EXTRA>
struct Chunk {
    using S = Streams<F, EXTRA>;
    Plane<F> base;
    std::array<Plane<S::SIGN>, EXTRA> extra;

    void unpack(S& s, int steps, int group) {
        for (int i = 0; i < steps; ++i, s.step()) {
            const bool head = i * STEP % group == 0;
            if (head) {
                base.units[i].read(s.p);
                for (int e = 0; e < EXTRA; ++e) extra[e].units[i].read(s.q[e]);
                s.head();
            } else {
                base.units[i] = base.units[i - 1];
                for (auto& plane : extra) plane.units[i] = plane.units[i - 1];
            }
            s.prefetch();
            base.unpack(i, s.p);
            for (int e = 0; e < EXTRA; ++e) extra[e].unpack(i, s.q[e]);
        }
    }
    Floats added(int i, int row, Ints total, Floats by, Floats so_far) const {
        so_far = base.added(i, row, total, by, so_far);
        for (auto& plane : extra) so_far = plane.added(i, row, total, by, so_far);
        return so_far;
    }
};

// W tiles times all rows of a bundle, a chunk of inputs after another.
template <Format F, int EXTRA, int W>
void multiply_tiles(const MatrixRef& w, int64_t tile, const Bundle& x, float* out) {
    using C = Chunk<F, EXTRA>;
    typename C::S streams[2] = {{w, tile}, {w, tile + W - 1}};
    C chunks[W];
    C &first = chunks[0], &second = chunks[W - 1];
    const int blocks = static_cast<int>(w.cols / STEP), rows = x.rows, most = std::min(rows, TOKENS);
    for (int b = 0, steps; b < blocks; b += steps) {
        steps = std::min(CHUNK, blocks - b);
        for (int t = 0; t < W; ++t) chunks[t].unpack(streams[t], steps, w.group);
        written(chunks);
        for (int row = 0; row < rows; row += TOKENS) {
            const int from = std::min(row, rows - most);  // the last rows share their products with the ones before them
            for (int i = 0; i < steps; ++i) {
                const int8_t* activations = x.codes + (static_cast<int64_t>(b + i) * rows + from) * STEP;
                multiply<W>(activations, i, first.base, second.base);
                for (int e = 0; e < EXTRA; ++e) multiply<W>(activations, i, first.extra[e], second.extra[e]);
            }
            for (int r = row; r < from + most; ++r) {
                Floats sums[W];
                for (int t = 0; t < W; ++t) sums[t] = b ? D::load_floats(out + (t * rows + r) * TILE) : D::set(0.0f);
                for (int i = 0; i < steps; ++i) {
                    const int64_t at = static_cast<int64_t>(b + i) * rows + r;
                    const Floats by = D::set(x.scales[at]);
                    const Ints total = D::set(x.sums[at]);
                    for (int t = 0; t < W; ++t) sums[t] = chunks[t].added(i, r - from, total, by, sums[t]);
                }
                for (int t = 0; t < W; ++t) D::store(out + (t * rows + r) * TILE, sums[t]);
            }
        }
    }
}

void product(const MatrixRef& w, int64_t tile, int count, const Bundle& x, float* out) {
    if (x.rows < FEW) return packed_avx512vnni()->product(w, tile, count, x, out);
    const Taken taken(std::min(x.rows, TOKENS));
    in_its_format(w, [&](auto kind) {
        using K = decltype(kind);
        int t = 0;
        for (; t + 2 <= count; t += 2) multiply_tiles<K::format, K::extra, 2>(w, tile + t, x, out + t * x.rows * TILE);
        if (t < count) multiply_tiles<K::format, K::extra, 1>(w, tile + t, x, out + t * x.rows * TILE);
    });
}

}  // namespace

const PackedLevel* packed_amx() {
    static const PackedLevel level{"amx", product, round_x86, packed_avx2()->encode};
    return &level;
}
}  // namespace moestro
#else
namespace moestro {
const PackedLevel* packed_amx() { return nullptr; }
}  // namespace moestro
#endif
