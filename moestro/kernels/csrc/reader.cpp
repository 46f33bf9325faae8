#include "reader.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <system_error>

#include "kernels.hpp"

namespace moestro {
namespace {
constexpr int64_t UNIT = 4096;
double since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
}  // namespace

Queue::Queue(int threads, bool direct, int64_t piece, int64_t later_piece)
    : direct_(direct), piece_(piece), later_piece_(later_piece) {
    sigset_t all, before;  // signals belong to Python's main thread
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
    } catch (...) {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        close();
        throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Queue::~Queue() { close(); }

std::pair<int64_t, int64_t> Queue::add(const std::string& path) {
    int direct = -1;
    const int buffered = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat facts;
    if (buffered < 0 || ::fstat(buffered, &facts) != 0) {
        const int code = errno;
        if (buffered >= 0) ::close(buffered);
        throw std::system_error(code, std::generic_category(), path);
    }
#ifdef O_DIRECT
    if (direct_) direct = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);  // -1 where the file system refuses
#endif
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) {
        ::close(buffered);
        if (direct >= 0) ::close(direct);
        throw std::invalid_argument("the reader is closed");
    }
    files_.push_back({path, static_cast<int64_t>(facts.st_size), direct, buffered});
    return {static_cast<int64_t>(files_.size()) - 1, files_.back().size};
}

int64_t Queue::reserve() {
    std::lock_guard<std::mutex> lock(mutex_);
    return ++next_;
}

void Queue::submit(int64_t ticket, const std::vector<ReadRequest>& reads, int hurry) {
    std::vector<Piece> pieces;
    const int64_t size = hurry == 0 ? piece_ : later_piece_;
    for (const auto& r : reads)
        for (int64_t at = 0; at < r.bytes; at += size)
            pieces.push_back({ticket, r.file, r.offset + at, std::min(size, r.bytes - at), r.into + at});
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (closed_) throw std::invalid_argument("the reader is closed");
        if (pieces.empty()) {
            ended_.push_back(ticket);
            return;
        }
        tickets_[ticket].left = static_cast<int64_t>(pieces.size());
        auto& queue = queues_.at(static_cast<size_t>(hurry));
        queue.insert(queue.end(), pieces.begin(), pieces.end());
    }
    if (pieces.size() == 1)
        work_.notify_one();
    else
        work_.notify_all();
}

std::vector<int64_t> Queue::reap() {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::move(ended_);
}

bool Queue::wait(int64_t ticket, std::chrono::milliseconds slice, int& code, std::string& message) {
    std::unique_lock<std::mutex> lock(mutex_);
    auto over = [&] {
        auto found = tickets_.find(ticket);
        return found == tickets_.end() || found->second.left == 0;
    };
    if (!finished_.wait_for(lock, slice, over)) return false;
    auto found = tickets_.find(ticket);
    code = 0;
    if (found != tickets_.end()) {
        code = found->second.code;
        message = found->second.message;
    }
    return true;
}

bool Queue::done(int64_t ticket) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = tickets_.find(ticket);
    return found == tickets_.end() || found->second.left == 0;
}

void Queue::promote(int64_t ticket, int hurry) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& to = queues_.at(static_cast<size_t>(hurry));
    for (auto from = static_cast<size_t>(hurry) + 1; from < queues_.size(); ++from) {
        auto& queue = queues_[from];
        const auto rest = std::stable_partition(queue.begin(), queue.end(), [&](const Piece& p) { return p.ticket != ticket; });
        to.insert(to.end(), rest, queue.end());
        queue.erase(rest, queue.end());
    }
}

void Queue::cancel(int64_t ticket) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& queue : queues_) {
        const auto rest = std::remove_if(queue.begin(), queue.end(), [&](const Piece& p) { return p.ticket == ticket; });
        const auto gone = queue.end() - rest;
        queue.erase(rest, queue.end());
        for (auto i = gone; i > 0; --i) end(ticket, 0, {});
    }
}

void Queue::close() {
    std::lock_guard<std::mutex> one(closing_);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        closed_ = true;
        for (auto& queue : queues_) {
            for (const auto& piece : queue) end(piece.ticket, CLOSED, "the reader was closed before this read began");
            queue.clear();
        }
    }
    work_.notify_all();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& file : files_) {
        ::close(file.buffered);
        if (file.direct >= 0) ::close(file.direct);
    }
    files_.clear();
}

int64_t Queue::bytes_read() {
    std::lock_guard<std::mutex> lock(mutex_);
    return bytes_read_;
}

double Queue::seconds_busy() {
    std::lock_guard<std::mutex> lock(mutex_);
    return seconds_busy_;
}

void Queue::run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        std::deque<Piece>* queue = nullptr;
        work_.wait(lock, [&] { return (queue = first()) != nullptr || closed_; });
        if (queue == nullptr) return;
        const Piece piece = queue->front();
        queue->pop_front();
        const File& file = files_[piece.file];
        if (flying_++ == 0) since_ = std::chrono::steady_clock::now();
        lock.unlock();
        const Outcome outcome = read(file, piece);
        lock.lock();
        if (--flying_ == 0) seconds_busy_ += since(since_);
        bytes_read_ += outcome.got;
        end(piece.ticket, outcome.code, outcome.message);
    }
}

std::deque<Queue::Piece>* Queue::first() {
    for (auto& queue : queues_)
        if (!queue.empty()) return &queue;
    return nullptr;
}

void Queue::end(int64_t ticket, int code, const std::string& message) {
    auto found = tickets_.find(ticket);
    Ticket& state = found->second;
    --state.left;
    if (code && !state.code) {
        state.code = code;
        state.message = message;
    }
    if (state.left) return;
    ended_.push_back(ticket);
    if (!state.code) tickets_.erase(found);
    finished_.notify_all();
}

Queue::Outcome Queue::read(const File& file, const Piece& piece) {
    auto where = [&] {
        return std::to_string(piece.bytes) + " bytes at " + std::to_string(piece.offset) + " of " + file.path + ", which has " +
               std::to_string(file.size) + " bytes";
    };
    const int64_t last = (file.size + UNIT - 1) / UNIT * UNIT;
    if (piece.offset + piece.bytes > last) return {0, END, where()};
    const int64_t wanted = std::max<int64_t>(0, std::min(piece.bytes, file.size - piece.offset));
    const auto address = static_cast<int64_t>(reinterpret_cast<intptr_t>(piece.into));
    bool direct = file.direct >= 0 && (piece.offset | piece.bytes | address) % UNIT == 0;
    int64_t got = 0;
    while (got < wanted) {
        const ssize_t count = ::pread(direct ? file.direct : file.buffered, piece.into + got,
                                      static_cast<size_t>(piece.bytes - got), static_cast<off_t>(piece.offset + got));
        if (count < 0) {
            if (errno == EINTR) continue;
            if (direct && errno == EINVAL) {  // the device wants another alignment
                direct = false;
                continue;
            }
            return {got, errno, where()};
        }
        if (count == 0) return {got, END, where() + " no more"};
        got += count;
        direct = direct && got % UNIT == 0;  // a direct read that stopped inside a block cannot go on directly
    }
#ifdef POSIX_FADV_DONTNEED
    if (!direct) ::posix_fadvise(file.buffered, piece.offset, piece.bytes, POSIX_FADV_DONTNEED);
#endif
    return {got, 0, {}};
}

bool populate([[maybe_unused]] void* buffer, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_POPULATE_WRITE  // Linux 5.14
    return ::madvise(buffer, static_cast<size_t>(bytes), MADV_POPULATE_WRITE) == 0;
#else
    return false;
#endif
}

}  // namespace moestro
