#include "plan.h"

#include <atomic>
#include <cmath>
#include <new>
#include <vector>

namespace lk {
namespace {

// Real additions and multiplications of a butterfly (a fused multiply-add counts once), to compare
// transform lengths with each other.
double butterfly_cost(int radix) {
  switch (radix) {
    case 2: return 4;
    case 3: return 14;
    case 4: return 16;
    case 5: return 36;
    case 6: return 40;
    case 7: return 66;
    case 8: return 56;
    case 9: return 96;
    case 10: return 92;
    case 12: return 104;
  }
  return 1e9;
}

// Per element and pass: twiddle factors, loads and stores (a store of a full vector takes two
// cycles on the machine at hand).
const double kTwiddleCost = 4, kMoveCost = 6;

struct Factors {
  double cost = 1e30;
  int passes = 0;
  int radix[Transform::kMaxPasses];
};

void factorize(int n, int rest, Factors& path, double cost, Factors& best) {
  static const int kRadices[] = {12, 10, 9, 8, 7, 6, 5, 4, 3, 2};
  if (rest == 1) {
    if (path.passes >= 2 && cost < best.cost) {
      best = path;
      best.cost = cost;
    }
    return;
  }
  if (path.passes == Transform::kMaxPasses) return;
  for (int radix : kRadices) {
    if (rest % radix) continue;
    const double pass = n / radix * butterfly_cost(radix) + kMoveCost * n +
                        (rest == radix ? 0 : kTwiddleCost * (n - n / radix));
    path.radix[path.passes++] = radix;
    factorize(n, rest / radix, path, cost + pass, best);
    --path.passes;
  }
}

Factors factorize(int n) {
  Factors path, best;
  factorize(n, n, path, 0, best);
  return best;
}

struct Owned : Transform {
  std::vector<float> twiddles;
  std::vector<int> positions;
  Owned* next = nullptr;
};

Owned* build(int n) {
  const Factors factors = factorize(n);
  Owned* t = new Owned;
  t->n = n;
  t->cost = factors.cost;
  t->passes = factors.passes;
  size_t total = 0;
  for (int pass = 0, rest = n; pass < t->passes; ++pass) {
    t->radix[pass] = factors.radix[pass];
    rest /= t->radix[pass];
    t->span[pass] = rest;
    total += 2 * static_cast<size_t>(rest) * (t->radix[pass] - 1);
  }
  t->twiddles.reserve(total);
  for (int pass = 0; pass < t->passes; ++pass) {
    const int span = t->span[pass], radix = t->radix[pass];
    t->twiddle[pass] = t->twiddles.data() + t->twiddles.size();
    if (span == 1) continue;
    for (int p = 0; p < span; ++p)
      for (int q = 1; q < radix; ++q) {
        const double angle = -2 * 3.14159265358979323846 * p * q / (span * radix);
        t->twiddles.push_back(static_cast<float>(std::cos(angle)));
        t->twiddles.push_back(static_cast<float>(std::sin(angle)));
      }
  }
  t->positions.resize(n);
  for (int k = 0; k < n; ++k) {
    int rest = k, place = 0;
    for (int pass = 0; pass < t->passes; ++pass) {
      place += rest % t->radix[pass] * t->span[pass];
      rest /= t->radix[pass];
    }
    t->positions[k] = place;
  }
  t->position = t->positions.data();
  return t;
}

// Transforms are kept for good: there are few lengths.  The list only grows and has no lock, which
// a fork could leave locked.
const Transform* transform(int n) {
  static std::atomic<Owned*> list{nullptr};
  Owned* head = list.load(std::memory_order_acquire);
  for (Owned* t = head; t; t = t->next)
    if (t->n == n) return t;
  Owned* fresh = build(n);
  fresh->next = head;
  while (!list.compare_exchange_weak(fresh->next, fresh)) {
  }
  return fresh;
}

// The cheapest length of at least n: a little longer may have better factors.
int good_length(int n) {
  int best = 0;
  double best_cost = 1e30;
  for (int m = n < 4 ? 4 : n; m <= n + n / 3 + 4; ++m) {
    const double cost = factorize(m).cost * m;  // the other axis grows alike
    if (cost < best_cost) {
      best_cost = cost;
      best = m;
    }
  }
  return best;
}

int cached_good_length(int n) {
  static std::atomic<int> lengths[512];
  if (n >= 512) return good_length(n);
  int length = lengths[n].load(std::memory_order_relaxed);
  if (!length) lengths[n].store(length = good_length(n), std::memory_order_relaxed);
  return length;
}

// Longer transforms than this would not leave the buffer of rows in the second-level cache.
const int kLongest = 192;

Axis make_axis(int64_t size, int kernel) {
  Axis axis;
  axis.size = size;
  axis.radius = size - 1 < kernel / 2 ? static_cast<int>(size - 1) : kernel / 2;
  axis.crop = kernel / 2 - axis.radius;
  axis.tile = size;
  int64_t needed = size + axis.radius;
  if (needed > kLongest) {
    const int64_t most = kLongest - 2 * axis.radius;
    const int64_t tiles = (size + most - 1) / most;
    axis.tile = (size + tiles - 1) / tiles;
    needed = axis.tile + 2 * axis.radius;
  }
  axis.tiles = (size + axis.tile - 1) / axis.tile;
  axis.transform = transform(cached_good_length(static_cast<int>(needed)));
  return axis;
}

}  // namespace

FftPlan make_plan(int64_t height, int64_t width, int kernel) {
  FftPlan plan;
  plan.y = make_axis(height, kernel);
  plan.x = make_axis(width, kernel);
  plan.columns = plan.x.transform->n / 2 + 1;
  // Odd, so that the elements of a column spread over all sets of the first-level cache.
  plan.row_stride = plan.columns | 1;
  return plan;
}

}  // namespace lk
