// Background reads: a queue for each degree of hurry, and a few threads.
#pragma once
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace moestro {

struct ReadRequest {
    int64_t file, offset, bytes;
    char* into;
};

class Queue {
public:
    static constexpr int END = -1, CLOSED = -2;  // codes besides 0 and errno values
    static constexpr int HURRIES = 3;            // 0 goes before 1, 1 before 2

    Queue(int threads, bool direct, int64_t piece, int64_t later_piece);
    ~Queue();
    Queue(const Queue&) = delete;
    Queue& operator=(const Queue&) = delete;

    // (index, size). std::system_error when it cannot be opened, std::invalid_argument once closed.
    std::pair<int64_t, int64_t> add(const std::string& path);
    int64_t reserve();
    void submit(int64_t ticket, const std::vector<ReadRequest>& reads, int hurry);
    std::vector<int64_t> reap();  // tickets that ended since the last call
    // Waits for at most `slice`; false when the ticket has not ended by then.
    bool wait(int64_t ticket, std::chrono::milliseconds slice, int& code, std::string& message);
    bool done(int64_t ticket);
    void promote(int64_t ticket, int hurry);  // what has less hurry gets so much
    void cancel(int64_t ticket);  // what has not begun is not read, and counts as ended
    void close();
    int64_t bytes_read();
    double seconds_busy();

private:
    struct File {
        std::string path;
        int64_t size;
        int direct, buffered;  // -1: none
    };
    struct Piece {
        int64_t ticket, file, offset, bytes;
        char* into;
    };
    struct Ticket {
        int64_t left;
        int code = 0;
        std::string message;
    };
    struct Outcome {
        int64_t got;
        int code;
        std::string message;
    };

    void run();
    void end(int64_t ticket, int code, const std::string& message);
    std::deque<Piece>* first();  // that is not empty; null if all are
    static Outcome read(const File& file, const Piece& piece);

    const bool direct_;
    const int64_t piece_, later_piece_;
    std::mutex mutex_, closing_;
    std::condition_variable work_, finished_;
    std::deque<File> files_;  // references stay valid while it grows
    std::array<std::deque<Piece>, HURRIES> queues_;
    std::map<int64_t, Ticket> tickets_;  // unfinished or failed ones only
    std::vector<int64_t> ended_;
    std::vector<std::thread> threads_;
    int64_t next_ = 0, flying_ = 0, bytes_read_ = 0;
    std::chrono::steady_clock::time_point since_;
    double seconds_busy_ = 0;
    bool closed_ = false;
};

}  // namespace moestro
