// What statistics of columns add to a gradient. What psi needs of a column is worked out beforehand, into one array for
// each of its numbers: a block of threads reads these along the columns as it reads the tile, and for its second row
// finds them in the cache.
#pragma once
#include <type_traits>

#include "device_tile.h"

namespace fl {
namespace FL_ISA {

// A column's derivatives, as arrays of `pitch` floats; all 0 where the column adds nothing.
struct Across {
  float* derivative;
  int64_t pitch;

  FL_DEVICE float* of(int i) const { return derivative + i * 4 * pitch; }
  FL_DEVICE void store(int i, int64_t column, const Derivative& d) const {
    float* to = of(i) + column;
    to[0] = d.weight, to[pitch] = d.center, to[2 * pitch] = d.offset, to[3 * pitch] = d.level;
  }
};

// g += psi of a statistic of columns, for a vector of scores in columns from `column` on, of which [low, high) are the
// tile's, in row `row` of the tile.
FL_DEVICE void add_across(const fl_statistic& k, const float* derivative, int64_t pitch, int64_t row, int64_t first_row,
                          int64_t column, int low, int high, const float* z, float* g) {
  uint32_t counts = 0;
#pragma unroll
  for (int i = 0; i < vector; ++i) {
    const bool counted = z[i] != -INFINITY && !((k.where & FL_REST) && k.rest[column + i] == first_row + row);
    counts |= (uint32_t)counted << i;
  }
  if (k.where & ~FL_REST)
    counts = related<vector>(k, z, counts, [&](int i) { return column + i; }, [&](int) { return row; });
  const float v = k.operand ? load_one(k.operand, k.operand_dtype, row) : 1;
  auto load = [&](const float* from, float* to) {   // only what the statistic reads is read
    load_vector(reinterpret_cast<const char*>(from), FL_F32, column, low, high, 0, to);
  };
  with_statistic<float>(k, 0, [&](const auto& shared) {
    float weight[vector], center[vector], offset[vector], level[vector], own[vector] = {};
    load(derivative, weight);
    load(derivative + pitch, center);
    load(derivative + 2 * pitch, offset);
    load(derivative + 3 * pitch, level);
    if (k.row) load(k.row, own);
#pragma unroll
    for (int i = 0; i < vector; ++i) {
      const std::decay_t<decltype(shared)> f(k, own[i]);
      const float psi = f.psi(z[i], v, Derivative{weight[i], center[i], offset[i], level[i]});
      if ((counts >> i & 1) && (weight[i] != 0 || offset[i] != 0)) g[i] += psi;
    }
  });
}

}  // namespace FL_ISA
}  // namespace fl
