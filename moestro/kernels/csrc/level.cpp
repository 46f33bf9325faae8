#include "level.hpp"

#include <atomic>
#include <stdexcept>

#include "packed.hpp"
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace moestro {
namespace {

#if defined(__x86_64__)
// Whether this process may multiply tiles of bytes with AMX; asks the kernel for it. Only on a processor with AVX.
bool may_use_amx() {
#if defined(__linux__)
    unsigned a, b, c, d;
    constexpr unsigned TILES_AND_INT8 = 3u << 24, STATES = 3u << 17;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & TILES_AND_INT8) != TILES_AND_INT8) return false;
    __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, from Linux 5.16
    return (a & STATES) == STATES && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

std::vector<FfnLevel> found() {
    std::vector<FfnLevel> out;
    // Kernels of packed tiles that do not agree with the portable ones are not used.
    const auto add = [&](const char* name, const FfnLevel* rows, const PackedLevel* packed, const PackedLevel* otherwise) {
        if (!rows) return;
        if (!packed || !agrees_with_scalar(*packed)) packed = otherwise;
        if (packed) out.push_back({name, rows->product, rows->activate, rows->soften, rows->blend, packed});
    };
    add("scalar", ffn_scalar(), nullptr, packed_scalar());
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        add("avx2", ffn_avx2(), packed_avx2(), packed_scalar());
#if defined(HAVE_AVXVNNI)  // compilers that do not know it cannot ask for it
        if (__builtin_cpu_supports("avxvnni")) add("avxvnni", ffn_avx2(), packed_avxvnni(), nullptr);
#endif
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512dq")) {
            add("avx512", ffn_avx512(), packed_avx2(), packed_scalar());
            if (__builtin_cpu_supports("avx512vnni")) {
                add("avx512vnni", ffn_avx512(), packed_avx512vnni(), nullptr);
                if (packed_amx() && may_use_amx()) add("amx", ffn_avx512(), packed_amx(), nullptr);
            }
        }
    }
#endif
#if defined(__aarch64__)
    add("neon", ffn_neon(), packed_neon(), packed_scalar());
#if defined(__linux__)
    const bool dot_products = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    const bool dot_products = true;  // every Apple processor of this kind has them
#endif
    if (dot_products) add("neondot", ffn_neon(), packed_neondot(), nullptr);
#endif
    return out;
}

const std::vector<FfnLevel>& machine() {
    static const std::vector<FfnLevel> all = found();
    return all;
}

std::atomic<const FfnLevel*> chosen{nullptr};

}  // namespace

const std::vector<std::string>& levels() {
    static const std::vector<std::string> names = [] {
        std::vector<std::string> out;
        for (auto& level : machine()) out.emplace_back(level.name);
        return out;
    }();
    return names;
}

const FfnLevel& current() {
    const FfnLevel* level = chosen.load(std::memory_order_acquire);
    return level ? *level : machine().back();
}

void set_level(const std::string& name) {
    for (auto& level : machine())
        if (name == level.name) {
            chosen.store(&level, std::memory_order_release);
            return;
        }
    throw std::invalid_argument("this machine does not have " + name);
}

}  // namespace moestro
