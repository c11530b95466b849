#include "../large_kernel.h"

#include <chrono>
#include <cstring>

namespace {

bool valid(const lk_shape* s) {
  return s && s->batch >= 0 && s->channels > 0 && s->height > 0 && s->width > 0 &&
         s->kernel >= 3 && s->kernel <= 63 && s->kernel % 2 == 1;
}

}  // namespace

extern "C" int lk_forward(const lk_shape* s, const float* x, const float* w, const float* bias,
                          float* y, int, int) {
  if (!valid(s) || !x || !w || !y) return LK_BAD_ARGUMENT;
  const int64_t H = s->height, W = s->width, K = s->kernel, R = K / 2;
  for (int64_t p = 0; p < s->batch * s->channels; ++p) {
    const int64_t c = p % s->channels;
    for (int64_t i = 0; i < H; ++i)
      for (int64_t j = 0; j < W; ++j) {
        double sum = bias ? bias[c] : 0.0;
        for (int64_t u = 0; u < K; ++u)
          for (int64_t v = 0; v < K; ++v) {
            const int64_t a = i + u - R, b = j + v - R;
            if (a >= 0 && a < H && b >= 0 && b < W)
              sum += double(w[(c * K + u) * K + v]) * x[(p * H + a) * W + b];
          }
        y[(p * H + i) * W + j] = float(sum);
      }
  }
  return LK_OK;
}

extern "C" int lk_gradients(const lk_shape* s, const float* x, const float* w, const float* dy,
                            float* dx, float* dw, int, int) {
  if (!valid(s) || !x || !w || !dy) return LK_BAD_ARGUMENT;
  const int64_t H = s->height, W = s->width, K = s->kernel, R = K / 2;
  if (dx) std::memset(dx, 0, sizeof(float) * s->batch * s->channels * H * W);
  if (dw) std::memset(dw, 0, sizeof(float) * s->channels * K * K);
  for (int64_t p = 0; p < s->batch * s->channels; ++p) {
    const int64_t c = p % s->channels;
    for (int64_t i = 0; i < H; ++i)
      for (int64_t j = 0; j < W; ++j) {
        const float g = dy[(p * H + i) * W + j];
        for (int64_t u = 0; u < K; ++u)
          for (int64_t v = 0; v < K; ++v) {
            const int64_t a = i + u - R, b = j + v - R;
            if (a < 0 || a >= H || b < 0 || b >= W) continue;
            if (dx) dx[(p * H + a) * W + b] += g * w[(c * K + u) * K + v];
            if (dw) dw[(c * K + u) * K + v] += g * x[(p * H + a) * W + b];
          }
      }
  }
  return LK_OK;
}

extern "C" int64_t lk_spectrum_floats(const lk_shape*) { return 0; }
extern "C" int lk_make_spectrum(const lk_shape*, const float*, float*, int) {
  return LK_BAD_ARGUMENT;
}
extern "C" int lk_forward_cached(const lk_shape*, const float*, const float*, const float*, float*,
                                 int) {
  return LK_BAD_ARGUMENT;
}
extern "C" int lk_choose(const lk_shape*, int) { return LK_DIRECT; }
extern "C" int lk_isa(void) { return LK_PORTABLE; }
extern "C" int lk_set_isa(int isa) { return isa == LK_PORTABLE ? LK_OK : LK_BAD_ARGUMENT; }
extern "C" double lk_peak_gflops(int) { return 1.0; }
