// What the code for one instruction set offers to the rest.  The same sources (simd.h, fft.h,
// direct.h) are compiled once per instruction set, in kernels_*.cpp.
#ifndef LK_KERNELS_H
#define LK_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "plan.h"

namespace lk {

struct Task {
  int64_t batch, channels, height, width;
  int kernel;
  const float *x, *weight, *dy, *bias;
  float *y, *dx, *dweight;
  const float* spectrum;  // made before, or null
  float* spectrum_out;
  FftPlan plan;           // FFT only
};

// Ways of the direct convolution: see direct.h.
enum DirectForm { kPlanar, kSliding, kBanded };

struct Kernels {
  // Channels are worked on in groups of `lanes`, side by side in a vector.
  int lanes;

  // Floats of one group's spectrum, and of scratch memory for the calls below.
  size_t (*fft_spectrum_floats)(const Task&);
  size_t (*fft_workspace_floats)(const Task&);
  void (*fft_spectrum)(const Task&, int64_t group, float* workspace);
  void (*fft_forward)(const Task&, int64_t group, int64_t first, int64_t last, float* workspace);
  void (*fft_gradients)(const Task&, int64_t group, float* workspace);

  size_t (*direct_workspace_floats)(const Task&, int form);
  void (*direct_forward)(const Task&, int form, int64_t group, int64_t first, int64_t last,
                         float* workspace);
  void (*direct_input_gradient)(const Task&, int form, int64_t group, float* workspace);
  void (*direct_weight_gradient)(const Task&, int form, int64_t group, float* workspace);

  // Keeps the multiply-add units busy with registers only; returns the operations done.
  double (*multiply_add)(int64_t repeats);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LK_X86 1
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace lk

#endif
