// Which algorithm, and which form of the direct one, a shape gets: the one with the lowest estimate.
// Estimates are in vector operations per image and group of channels.  Their factors were fitted to
// measurements (docs/kernels.md), and they depend on the shape only: the number of threads must not
// change the result's bits.
#ifndef LK_RULE_H
#define LK_RULE_H

#include "../large_kernel.h"
#include "kernels.h"
#include "plan.h"

namespace lk {

// Pairs of a result's row and a sample's row that a tap connects.
inline double connected(int64_t size, int radius) {
  return static_cast<double>(size) * (2 * radius + 1) -
         static_cast<double>(radius) * (radius + 1);
}

inline int effective_radius(int64_t size, int kernel) {
  return size - 1 < kernel / 2 ? static_cast<int>(size - 1) : kernel / 2;
}

inline double direct_estimate(const lk_shape& s, int form, int lanes, bool weight_gradient) {
  const int radius_y = effective_radius(s.height, s.kernel);
  const int radius_x = effective_radius(s.width, s.kernel);
  const double rows = connected(s.height, radius_y), cols = 2 * radius_x + 1;
  const double area = static_cast<double>(s.height) * s.width;
  const double taps = (2 * radius_y + 1) * cols;
  const int64_t vectors = (s.width + lanes - 1) / lanes;
  if (form == kPlanar) {
    // The gradient reads a vector of samples per multiply-add, most of them across two cache lines,
    // and adds up the lanes of every tap.
    return weight_gradient ? lanes * (1.7 * rows * vectors * cols + 20 * s.height * vectors + 20 * taps)
                           : lanes * (1.15 * rows * vectors * cols + 16 * s.height * vectors);
  }
  const double rearrange = 28 * area;
  if (form == kSliding) return rows * s.width * cols * 1.15 + rearrange;
  const int block = band_block_of(static_cast<int>(s.width));
  const double blocks = static_cast<double>((s.width + block - 1) / block);
  const int reach = (radius_x + block - 1) / block;
  const double pairs = connected(static_cast<int64_t>(blocks),
                                 reach < blocks - 1 ? reach : static_cast<int>(blocks - 1));
  return rows * pairs * (block * block + 4) * 1.05 + rearrange;
}

inline int direct_form(const lk_shape& s, int lanes, bool weight_gradient) {
  int best = kPlanar;
  for (int form = kSliding; form <= kBanded; ++form)
    if (direct_estimate(s, form, lanes, weight_gradient) <
        direct_estimate(s, best, lanes, weight_gradient))
      best = form;
  return best;
}

inline double fft_estimate(const lk_shape& s, int pass) {
  const FftPlan plan = make_plan(s.height, s.width, s.kernel);
  const double tiles = static_cast<double>(plan.y.tiles) * static_cast<double>(plan.x.tiles);
  const double row = plan.x.transform->cost / 2, column = plan.columns * plan.y.transform->cost;
  const double elements = static_cast<double>(plan.columns) * plan.y.transform->n;
  const double map_rows = tiles * plan.y.tile, kernel_rows = 2 * plan.y.radius + 1;
  const double map = map_rows * row + tiles * column, weight = kernel_rows * row + column;
  const double rearrange = 10 * static_cast<double>(s.height) * s.width;
  const double images = s.batch < 1 ? 1 : static_cast<double>(s.batch);
  // The operations counted overlap: additions, multiplications, loads and stores have units of
  // their own.
  const double overlap = 0.65;
  switch (pass) {
    case LK_FORWARD_CACHED: return overlap * (2 * (map + rearrange) + 8 * tiles * elements);
    case LK_FORWARD:
      return overlap * (2 * (map + rearrange) + 8 * tiles * elements + weight / images);
    default: return overlap * (3 * (map + rearrange) + 20 * tiles * elements + 2 * weight / images);
  }
}

}  // namespace lk

#endif
