// 1x1 convolution with stride 1 on the CPU, contiguous float32 in NCHW: matrix products, for which
// the oneDNN library that comes with Paddle is asked directly. Paddle's own way leads to MKL, which
// runs at a sixth of the speed on other makers' processors.
//
// Deterministic as large_kernel.h is: the product is cut into the same tiles for any number of
// threads, and each is computed by one thread.
#ifndef POINTWISE_H
#define POINTWISE_H

#include <stdint.h>

#include "large_kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t batch, in_channels, out_channels, pixels;
} pw_shape;

// Whether oneDNN has been loaded into this process, which Paddle does.
LK_API int pw_available(void);

// y (batch, out_channels, pixels) = weight (out_channels, in_channels) * x (batch, in_channels,
// pixels). Results as in large_kernel.h.
LK_API int pw_forward(const pw_shape* shape, const float* x, const float* weight, float* y,
                      int threads);

// Gradients by the input and by the weight; dx or dweight may be null and is then not computed.
LK_API int pw_gradients(const pw_shape* shape, const float* x, const float* weight,
                        const float* dy, float* dx, float* dweight, int threads);

#ifdef __cplusplus
}
#endif

#endif
