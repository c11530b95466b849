// How a convolution is cut into tiles and Fourier transforms.  Nothing here depends on the
// instruction set.
#ifndef LK_PLAN_H
#define LK_PLAN_H

#include <stdint.h>

namespace lk {

// A complex transform of length n, as in-place passes of the given radices.  The forward transform
// is decimated in frequency: it takes samples in natural order and leaves frequency k at
// position[k].  The inverse undoes the passes in reverse order, so that nothing is ever permuted.
struct Transform {
  enum { kMaxPasses = 8 };
  int n;
  double cost;  // estimate, in vector operations
  int passes;   // at least 2
  int radix[kMaxPasses];
  int span[kMaxPasses];              // distance between the inputs of one butterfly
  const float* twiddle[kMaxPasses];  // span x (radix - 1) pairs (cos, -sin); none in the last pass
  const int* position;
};

// A tile of outputs depends on a window of inputs, the tile and `radius` samples around it, as far
// as the map goes.  The transform needs only be so long that what wraps around does not reach the
// wanted outputs: for a whole map size + radius, for one of several tiles tile + 2 radius.
struct Axis {
  int64_t size;    // of the map
  int radius;      // of the kernel, without the taps that never meet the map
  int crop;        // kernel / 2 - radius: rows of the kernel left out at either end
  int64_t tile;    // outputs per tile (the last one may have fewer)
  int64_t tiles;
  const Transform* transform;
};

struct FftPlan {
  Axis y, x;
  int columns;      // of the half spectrum of real rows: x.n / 2 + 1
  int row_stride;   // of the buffer of transformed rows, in complex elements
};

FftPlan make_plan(int64_t height, int64_t width, int kernel);

// The block of the banded direct convolution (see direct.h) that wastes least.
inline int band_block_of(int width) {
  int best = 8;
  for (int block = 7; block >= 5; --block)
    if ((width + block - 1) / block * block < (width + best - 1) / best * best) best = block;
  return best;
}

}  // namespace lk

#endif
