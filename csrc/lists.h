// Rows of items, as every kernel of the sort engine takes them.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Row r is items [r * width, (r + 1) * width), or with offsets [offsets[r], offsets[r + 1]) and width is the longest row.
// Items whose mask is 0 are left out: nothing is read of them but the mask, and what is written for them is 0.
typedef struct {
  int64_t rows, width;
  const int64_t* offsets;    // null, or rows + 1 of them, rising from 0
  const uint8_t* mask;       // null, or one byte per item
} fl_lists;

#ifdef __cplusplus
}

namespace fl {

inline int64_t first_item(const fl_lists& lists, int64_t row) { return lists.offsets ? lists.offsets[row] : row * lists.width; }
inline int64_t count_items(const fl_lists& lists, int64_t row) {
  return lists.offsets ? lists.offsets[row + 1] - lists.offsets[row] : lists.width;
}
inline int64_t all_items(const fl_lists& lists) { return lists.offsets ? lists.offsets[lists.rows] : lists.rows * lists.width; }

}  // namespace fl
#endif
