#include "pool.hpp"

#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace moestro {
namespace {

// A decode step hands out work a hundred times. A thread that sleeps wakes tens of microseconds late, so one that has nothing to do
// looks for work this long before it sleeps; soon it lets others run between two looks.
constexpr std::chrono::microseconds AWAKE{300};
constexpr int POLITE_AFTER = 500;  // looks

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether `ready` became true while awake.
template <class Ready>
bool look(Ready&& ready) {
    for (int i = 0; i < POLITE_AFTER; ++i) {
        if (ready()) return true;
        relax();
    }
    const auto until = std::chrono::steady_clock::now() + AWAKE;
    do {
        std::this_thread::yield();
        if (ready()) return true;
    } while (std::chrono::steady_clock::now() < until);
    return false;
}

class Pool {
public:
    void run(int threads, void (*job)(void*, int), void* context) {
        std::lock_guard<std::mutex> turn(turn_);
        grow(threads - 1);
        job_ = job;
        context_ = context;
        wanted_.store(std::min(threads - 1, size_));
        if (asleep_.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        job(context, 0);
        wanted_.store(0);  // whoever has not begun is not needed any more
        const auto ended = [this] { return running_.load() == 0; };
        if (look(ended)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        waiting_.store(true);
        idle_.wait(lock, ended);
        waiting_.store(false);
    }

private:
    void grow(int size) {
        if (size_ >= size) return;
        // Ctrl-C and the like belong to Python's main thread.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (; size_ < size; ++size_) std::thread([this] { work(); }).detach();
        } catch (const std::system_error&) {  // no more threads to be had: fewer will do
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void work() {
        const auto called = [this] { return wanted_.load() > 0; };
        for (;;) {
            if (!look(called)) {
                std::unique_lock<std::mutex> lock(mutex_);
                ++asleep_;
                wake_.wait(lock, called);
                --asleep_;
            }
            ++running_;  // before a place is taken: a caller that finds no place left to take back then waits for this thread
            int place = wanted_.load();
            while (place > 0 && !wanted_.compare_exchange_weak(place, place - 1)) {
            }
            if (place > 0) job_(context_, place);
            if (--running_ == 0 && waiting_.load()) {
                std::lock_guard<std::mutex> lock(mutex_);
                idle_.notify_one();
            }
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, idle_;
    void (*job_)(void*, int) = nullptr;
    void* context_ = nullptr;
    int size_ = 0;
    std::atomic<int> wanted_{0}, running_{0}, asleep_{0};  // places left; threads at work; threads that must be woken
    std::atomic<bool> waiting_{false};                     // the caller sleeps until nobody is at work
};

// Never destroyed: its threads may outlive main. A forked child has no threads, so it gets a new pool.
Pool* the_pool = nullptr;

Pool& pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        the_pool = new Pool;
        pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });
    });
    return *the_pool;
}

}  // namespace

void run_on_pool(int threads, void (*job)(void*, int), void* context) {
    if (threads <= 1)
        job(context, 0);
    else
        pool().run(threads, job, context);
}

}  // namespace moestro
