// For any machine: vectors of four floats, which the compiler makes of what there is.
#include "kernels.h"

#define LK_LANES 4

namespace lk {
namespace {
#include "kernels.inc"
}  // namespace

extern const Kernels kPortableKernels = LK_KERNEL_TABLE;
}  // namespace lk
