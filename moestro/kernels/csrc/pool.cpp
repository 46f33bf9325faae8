#include "pool.hpp"

#include <pthread.h>
#include <signal.h>

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace moestro {
namespace {

class Pool {
public:
    void run(int threads, void (*job)(void*, int), void* context) {
        std::lock_guard<std::mutex> turn(turn_);
        grow(threads - 1);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = job;
            context_ = context;
            next_worker_ = 1;
            wanted_ = std::min(threads - 1, size_);
        }
        wake_.notify_all();
        job(context, 0);
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0;  // whoever has not begun is not needed any more
        idle_.wait(lock, [this] { return running_ == 0; });
    }

private:
    void grow(int size) {
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
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return wanted_ > 0; });
            --wanted_;
            ++running_;
            const int worker = next_worker_++;
            auto* job = job_;
            auto* context = context_;
            lock.unlock();
            job(context, worker);
            lock.lock();
            if (--running_ == 0) idle_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, idle_;
    void (*job_)(void*, int) = nullptr;
    void* context_ = nullptr;
    int size_ = 0, wanted_ = 0, running_ = 0, next_worker_ = 1;
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
