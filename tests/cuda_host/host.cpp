// What the kernels' library has beside them on the host: the error text, and another order of threads and blocks.
#include "arguments.h"
#include "cuda_on_host.h"

extern "C" {
const char* fl_error(void) { return fl::error_text; }
void fl_host_seed(uint64_t seed) { host::device.random = seed * 2 + 1; }
}
