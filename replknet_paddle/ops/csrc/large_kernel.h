// Depthwise 2-D convolution with stride 1 and same padding on the CPU: the C interface.
//
// Tensors are contiguous float32 in host memory: x, y, dy, dx (batch, channels, height, width),
// weight, dweight (channels, 1, kernel, kernel), bias (channels).  As in every deep-learning
// framework "convolution" is the cross-correlation
//     y[b,c,i,j] = bias[c] + sum_{u,v} weight[c,0,u,v] x[b,c, i+u-kernel/2, j+v-kernel/2],
// taps outside the map counting as zero.  Output buffers must not overlap inputs.
//
// Every function may be called from several threads at once and from a forked child.  For given
// inputs and a given instruction set the result has the same bits for any number of threads.
#ifndef LARGE_KERNEL_H
#define LARGE_KERNEL_H

#include <stdint.h>

#if defined(__GNUC__)
#define LK_API __attribute__((visibility("default")))
#else
#define LK_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t batch, channels, height, width;  // at least 1 (batch: 0); a map's sides at most 2^24
  int kernel;                              // odd, 3 to 63
} lk_shape;

enum { LK_AUTO = 0, LK_DIRECT = 1, LK_FFT = 2 };                     // algorithm
enum { LK_FORWARD = 0, LK_GRADIENTS = 1, LK_FORWARD_CACHED = 2 };    // pass
enum { LK_PORTABLE = 0, LK_AVX2 = 1, LK_AVX512 = 2 };                // instruction set
enum { LK_OK = 0, LK_BAD_ARGUMENT = 1, LK_NO_MEMORY = 2 };           // result

// y = convolution of x.  bias may be null.
LK_API int lk_forward(const lk_shape* shape, const float* x, const float* weight,
                      const float* bias, float* y, int algorithm, int threads);

// Gradients by the input and by the weight; dx or dweight may be null and is then not computed.
LK_API int lk_gradients(const lk_shape* shape, const float* x, const float* weight,
                        const float* dy, float* dx, float* dweight, int algorithm, int threads);

// For inference, where the weight stays: the weight in the form the kernels want it.  The size is
// in floats, 0 where that is not worth while (lk_forward is then to be used).  It depends on
// channels, height, width and kernel, not on batch, and on the instruction set in use.
LK_API int64_t lk_spectrum_floats(const lk_shape* shape);
LK_API int lk_make_spectrum(const lk_shape* shape, const float* weight, float* spectrum,
                            int threads);
LK_API int lk_forward_cached(const lk_shape* shape, const float* x, const float* spectrum,
                             const float* bias, float* y, int threads);

// The algorithm (LK_DIRECT or LK_FFT) that LK_AUTO takes, by a rule made from measurements.
LK_API int lk_choose(const lk_shape* shape, int pass);

// The instruction set in use: the best that this machine has, unless lk_set_isa asked for a lesser
// one (for tests; not while another thread computes).  lk_set_isa returns LK_BAD_ARGUMENT for one
// that the machine or the compiler lacks.
LK_API int lk_isa(void);
LK_API int lk_set_isa(int isa);

// Peak rate of fused multiply-adds (or multiply and add) from registers, measured now on that many
// threads for about 50 ms, in 1e9 floating-point operations per second.
LK_API double lk_peak_gflops(int threads);

#ifdef __cplusplus
}
#endif

#endif
