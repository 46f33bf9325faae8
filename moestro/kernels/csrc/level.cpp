#include "level.hpp"

#include <atomic>
#include <stdexcept>

namespace moestro {
namespace {

std::vector<const FfnLevel*> found() {
    std::vector<const FfnLevel*> out{ffn_scalar()};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        if (ffn_avx2()) out.push_back(ffn_avx2());
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512dq") && ffn_avx512())
            out.push_back(ffn_avx512());
    }
#endif
    if (ffn_neon()) out.push_back(ffn_neon());
    return out;
}

const std::vector<const FfnLevel*>& machine() {
    static const std::vector<const FfnLevel*> all = found();
    return all;
}

std::atomic<const FfnLevel*> chosen{nullptr};

}  // namespace

const std::vector<std::string>& levels() {
    static const std::vector<std::string> names = [] {
        std::vector<std::string> out;
        for (auto* level : machine()) out.emplace_back(level->name);
        return out;
    }();
    return names;
}

const FfnLevel& current() {
    const FfnLevel* level = chosen.load(std::memory_order_acquire);
    return level ? *level : *machine().back();
}

void set_level(const std::string& name) {
    for (auto* level : machine())
        if (name == level->name) {
            chosen.store(level, std::memory_order_release);
            return;
        }
    throw std::invalid_argument("this machine does not have " + name);
}

}  // namespace moestro
