// Sparsemax and entmax on the CPU: threads over rows.
#include "threshold.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "arguments.h"

namespace fl {
namespace {

constexpr int64_t worth_threads = 1 << 14;   // scores

const ThresholdRows& in_use() {
#if defined(FL_X86)
  if (std::strcmp(fl_isa(), "avx512") == 0) return avx512::threshold_rows;
  if (std::strcmp(fl_isa(), "avx2") == 0) return avx2::threshold_rows;
#endif
  return portable::threshold_rows;
}

int check_threshold(const char* name, const fl_threshold* t, bool needs_out) {
  if (!t) return fail("%s: nothing is given", name);
  const fl_lists& l = t->lists;
  if (l.rows < 0 || l.width < 0 || l.width > INT32_MAX - 64)
    return fail("%s: %lld rows of %lld scores", name, (long long)l.rows, (long long)l.width);
  if (l.mask) return fail("%s: a mask is not read", name);
  if (t->kind != FL_SPARSEMAX && t->kind != FL_ENTMAX15) return fail("%s: kind %d is unknown", name, t->kind);
  for (int32_t dtype : {t->dtype, t->out_dtype})
    if (!is_dtype(dtype) && dtype != FL_F64) return fail("%s: dtype %d is unknown", name, dtype);
  if (l.rows > 0 && l.width > 0 && (!t->scores || (needs_out && !t->out)))
    return fail("%s: scores or out is null", name);
  return 0;
}

int run(const char* name, const fl_threshold& t, const ThresholdLoss& loss) {
  const int64_t rows = t.lists.rows, scratch = (threshold_scratch(t.lists.width) + 63) / 64 * 64;
  const int threads = rows * t.lists.width < worth_threads ? 1 : (int)std::min<int64_t>(rows, omp_get_max_threads());
  char* const memory = static_cast<char*>(std::aligned_alloc(64, (size_t)scratch * std::max(1, threads)));
  if (!memory) return fail("%s: no memory", name);
  const ThresholdRows& kernels = in_use();
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (int64_t i = 0; i < rows; ++i) kernels.rows(t, loss, i, i + 1, memory + omp_get_thread_num() * scratch);
  std::free(memory);
  return 0;
}

}  // namespace
}  // namespace fl

extern "C" {

int fl_threshold_project(const fl_threshold* t) {
  if (int status = fl::check_threshold("threshold", t, true)) return status;
  return fl::run("threshold", *t, {nullptr, nullptr, nullptr});
}

int fl_threshold_loss(const fl_threshold* t, const int64_t* target, const double* factor, double* losses) {
  if (int status = fl::check_threshold("threshold_loss", t, false)) return status;
  if (t->lists.rows == 0) return 0;
  if (!target || !losses) return fl::fail("threshold_loss: target or losses is null");
  for (int64_t i = 0; i < t->lists.rows; ++i)
    if (target[i] < 0 || target[i] >= t->lists.width || t->lists.offsets)
      return fl::fail("threshold_loss: target %lld of row %lld is not one of %lld classes", (long long)target[i],
                      (long long)i, (long long)t->lists.width);
  return fl::run("threshold_loss", *t, {target, factor, losses});
}

int fl_threshold_backward(const fl_threshold* t, const void* g) {
  if (int status = fl::check_threshold("threshold_backward", t, true)) return status;
  if (t->out_dtype != t->dtype) return fl::fail("threshold_backward: expected one dtype");
  const int64_t rows = t->lists.rows;
  if (rows == 0 || t->lists.width == 0) return 0;
  if (!g) return fl::fail("threshold_backward: g is null");
  const fl::ThresholdRows& kernels = fl::in_use();
#pragma omp parallel for if (rows > 1 && rows * t->lists.width >= fl::worth_threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) kernels.backward(*t, g, i, i + 1);
  return 0;
}

}  // extern "C"
