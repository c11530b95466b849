// All headers come before the target is raised, so that none of their inline functions is compiled
// for it.
#include "kernels.h"

#ifdef LK_X86
#include <immintrin.h>

// GCC's own intrinsics start from undefined registers.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#define LK_LANES 16

namespace lk {
namespace {
#include "kernels.inc"
}  // namespace

extern const Kernels kAvx512Kernels = LK_KERNEL_TABLE;
}  // namespace lk
#endif
