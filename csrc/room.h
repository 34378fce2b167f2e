// Scratch memory of a call.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace fl {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch memory of one call, all of it free again when the call ends. What a call took in several pieces the next one
// of this thread finds in one.
class Room {
 public:
  Room() { used_ = 0; }
  ~Room() {
    if (pieces().size() == 1 && pieces()[0].bytes <= kKept) return;
    size_t all = 0;
    for (Piece& piece : pieces()) all += piece.bytes, std::free(piece.data);
    pieces().clear();
    if (all > 0 && all <= kKept) add(all);
  }
  Room(const Room&) = delete;

  template <class Number>
  Number* take(int64_t count) {
    const size_t bytes = (size_t)divide_up(count * (int64_t)sizeof(Number), kLine) * kLine;
    if (pieces().empty() || used_ + bytes > pieces().back().bytes) {
      if (!add(std::max(bytes, kLeast))) throw std::bad_alloc();
      used_ = 0;
    }
    used_ += bytes;
    return reinterpret_cast<Number*>(pieces().back().data + used_ - bytes);
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr size_t kKept = size_t(64) << 20, kLeast = size_t(1) << 16;
  struct Piece {
    char* data;
    size_t bytes;
  };
  struct Pieces : std::vector<Piece> {
    ~Pieces() {
      for (Piece& piece : *this) std::free(piece.data);
    }
  };
  static Pieces& pieces() {
    static thread_local Pieces of_thread;
    return of_thread;
  }
  static bool add(size_t bytes) {
    char* const data = static_cast<char*>(std::aligned_alloc(kLine, bytes));
    if (data) pieces().push_back({data, bytes});
    return data != nullptr;
  }
  size_t used_;
};

}  // namespace fl
