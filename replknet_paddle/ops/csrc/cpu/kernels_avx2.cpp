// All headers come before the target is raised, so that none of their inline functions is compiled
// for it.
#include "kernels.h"

#ifdef LK_X86
#include <immintrin.h>

#pragma GCC target("avx2,fma")
#define LK_LANES 8

namespace lk {
namespace {
#include "kernels.inc"
}  // namespace

extern const Kernels kAvx2Kernels = LK_KERNEL_TABLE;
}  // namespace lk
#endif
