// Checks of ops/csrc without a framework: against float64 loops, against each other, with several
// threads and processes.  Compiled and run by test_csrc.py, also under sanitizers.
//
//     csrc_test [random shapes] [seed]
//
// Below 100 shapes the large ones are left out as well, for sanitizers.  Prints the worst errors;
// exit status 1 if a check fails.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <limits>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../replknet_paddle/ops/csrc/large_kernel.h"
#include "../../replknet_paddle/ops/csrc/pointwise.h"

namespace {

typedef std::vector<float> Floats;

int failures = 0;

void fail(const std::string& what) {
  printf("FAILED %s\n", what.c_str());
  ++failures;
}

const char* const kIsaNames[] = {"portable", "avx2", "avx512"};
const char* const kAlgorithmNames[] = {"auto", "direct", "fft"};

std::string text(const lk_shape& s) {
  char buffer[120];
  snprintf(buffer, sizeof buffer, "%ldx%ldx%ldx%ld kernel %d", static_cast<long>(s.batch),
           static_cast<long>(s.channels), static_cast<long>(s.height), static_cast<long>(s.width),
           s.kernel);
  return buffer;
}

struct Case {
  lk_shape shape;
  Floats x, weight, bias, dy;

  Case(const lk_shape& s, unsigned seed) : shape(s) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const size_t map = s.batch * s.channels * s.height * s.width;
    x.resize(map);
    dy.resize(map);
    weight.resize(s.channels * s.kernel * s.kernel);
    bias.resize(s.channels);
    for (Floats* values : {&x, &dy, &weight, &bias})
      for (float& value : *values) value = normal(random);
  }
};

// What the kernels compute; filled with NaN beforehand, so that nothing left out goes unseen.
struct Results {
  Floats y, dx, dweight;
  explicit Results(const Case& c)
      : y(c.x.size(), NAN), dx(c.x.size(), NAN), dweight(c.weight.size(), NAN) {}
};

bool same(const Floats& a, const Floats& b) {
  return a.size() == b.size() &&
         (a.empty() || !memcmp(a.data(), b.data(), a.size() * sizeof(float)));
}

bool same(const Results& a, const Results& b) {
  return same(a.y, b.y) && same(a.dx, b.dx) && same(a.dweight, b.dweight);
}

Results compute(const Case& c, int algorithm, int threads) {
  Results r(c);
  if (lk_forward(&c.shape, c.x.data(), c.weight.data(), c.bias.data(), r.y.data(), algorithm,
                 threads) != LK_OK ||
      lk_gradients(&c.shape, c.x.data(), c.weight.data(), c.dy.data(), r.dx.data(),
                   r.dweight.data(), algorithm, threads) != LK_OK)
    fail("return value for " + text(c.shape));
  return r;
}

struct Reference {
  std::vector<double> y, dx, dweight;

  explicit Reference(const Case& c)
      : y(c.x.size()), dx(c.x.size()), dweight(c.weight.size()) {
    const lk_shape& s = c.shape;
    const int64_t h = s.height, w = s.width, k = s.kernel, r = k / 2;
    for (int64_t p = 0; p < s.batch * s.channels; ++p) {
      const int64_t channel = p % s.channels;
      const float* weight = &c.weight[channel * k * k];
      double* dw = &dweight[channel * k * k];
      for (int64_t i = 0; i < h * w; ++i) y[p * h * w + i] = c.bias[channel];
      for (int64_t i = 0; i < h; ++i)
        for (int64_t u = i < r ? r - i : 0; u < k && i + u - r < h; ++u)
          for (int64_t j = 0; j < w; ++j) {
            const int64_t out = (p * h + i) * w + j, in = (p * h + i + u - r) * w + j - r;
            double sum = 0;
            const double g = c.dy[out];
            for (int64_t v = j < r ? r - j : 0; v < k && j + v - r < w; ++v) {
              const double value = weight[u * k + v], sample = c.x[in + v];
              sum += value * sample;
              dx[in + v] += value * g;
              dw[u * k + v] += sample * g;
            }
            y[out] += sum;
          }
    }
  }
};

double relative_error(const Floats& got, const std::vector<double>& wanted) {
  double error = 0, largest = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double e = fabs(got[i] - wanted[i]);
    if (isnan(e)) return NAN;
    error = fmax(error, e);
    largest = fmax(largest, fabs(wanted[i]));
  }
  return error / fmax(largest, 1e-30);
}

double inner(const Floats& a, const Floats& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

double norm(const Floats& a) { return sqrt(inner(a, a)); }

std::vector<int> instruction_sets() {
  std::vector<int> sets;
  for (int isa = LK_PORTABLE; isa <= LK_AVX512; ++isa)
    if (lk_set_isa(isa) == LK_OK) sets.push_back(isa);
  return sets;
}

std::map<std::string, double> worst;

void note(const std::string& what, double error, double bound, const std::string& where) {
  double& w = worst[what];
  if (!(error <= w)) w = error;
  if (!(error <= bound)) {
    char value[40];
    snprintf(value, sizeof value, " %.3g", error);
    fail(what + value + " " + where);
  }
}

// <conv(x), g> = <x, dgrad(g)> = <w, wgrad>, relative to the product of the norms, by which
// rounding errors scale.
void check_adjoint(const Case& c, const Results& r, const std::string& name) {
  Floats y(r.y);
  const int64_t area = c.shape.height * c.shape.width;
  for (size_t i = 0; i < y.size(); ++i) y[i] -= c.bias[i / area % c.shape.channels];
  const double a = inner(y, c.dy), b = inner(c.x, r.dx), d = inner(c.weight, r.dweight);
  const double scale = norm(y) * norm(c.dy) + 1e-30;
  note(name + " adjoint", fabs(a - b) / scale, 1e-5, text(c.shape));
  note(name + " adjoint", fabs(a - d) / scale, 1e-5, text(c.shape));
}

void check_shape(const lk_shape& shape, unsigned seed, const std::vector<int>& sets) {
  const Case c(shape, seed);
  const Reference reference(c);
  for (int isa : sets) {
    lk_set_isa(isa);
    for (int algorithm : {LK_DIRECT, LK_FFT}) {
      const std::string name = std::string(kIsaNames[isa]) + " " + kAlgorithmNames[algorithm];
      const double bound = algorithm == LK_DIRECT ? 2e-6 : 2e-5;
      const Results r = compute(c, algorithm, 1 + seed % 3);
      note(name + " y", relative_error(r.y, reference.y), bound, text(shape));
      note(name + " dx", relative_error(r.dx, reference.dx), bound, text(shape));
      note(name + " dweight", relative_error(r.dweight, reference.dweight), bound, text(shape));
      check_adjoint(c, r, name);
    }
  }
}

lk_shape random_shape(std::mt19937& random) {
  const auto upto = [&](int n) { return 1 + static_cast<int64_t>(random() % n); };
  lk_shape s = {upto(9), upto(35), upto(24), upto(24), static_cast<int>(2 * upto(31) + 1)};
  if (random() % 4 == 0) s.height = upto(70);
  if (random() % 4 == 0) s.width = upto(70);
  if (s.batch * s.channels * s.height * s.width > 30000) {
    s.batch = 1 + s.batch % 2;
    s.channels = 1 + s.channels % 18;
  }
  return s;
}

// RepLKNet's stages, a map of several tiles, and maps of one row, column or pixel.
const lk_shape kLarge[] = {{2, 17, 56, 56, 31}, {2, 17, 28, 28, 29}, {3, 40, 14, 14, 27},
                           {3, 40, 7, 7, 13},   {1, 2, 230, 150, 31}, {1, 1, 330, 3, 63},
                           {2, 3, 1, 200, 9},   {1, 1, 1, 1, 63}};

// One for each algorithm and form, with several groups of channels.
const lk_shape kShapes[] = {{2, 33, 20, 20, 15}, {1, 40, 14, 14, 27}, {3, 40, 7, 7, 13},
                            {2, 16, 20, 32, 3},  {5, 35, 9, 10, 5}};

void check_threads(const std::vector<int>& sets) {
  for (int isa : sets) {
    lk_set_isa(isa);
    for (const lk_shape& shape : kShapes) {
      const Case c(shape, 5);
      for (int algorithm : {LK_AUTO, LK_DIRECT, LK_FFT}) {
        const Results one = compute(c, algorithm, 1);
        for (int threads : {2, 3, 5, 8})
          if (!same(one, compute(c, algorithm, threads)))
            fail("other bits with more threads: " + text(shape));
      }
    }
  }
}

// AUTO is what lk_choose names; a cached spectrum changes nothing; each gradient alone is the same.
void check_agreement(const std::vector<int>& sets) {
  for (int isa : sets) {
    lk_set_isa(isa);
    for (const lk_shape& shape : kShapes) {
      const Case c(shape, 7);
      const Results automatic = compute(c, LK_AUTO, 2);
      if (!same(automatic.y, compute(c, lk_choose(&shape, LK_FORWARD), 2).y) ||
          !same(automatic.dx, compute(c, lk_choose(&shape, LK_GRADIENTS), 2).dx))
        fail("auto is not what lk_choose says: " + text(shape));
      Results alone(c);
      lk_gradients(&shape, nullptr, c.weight.data(), c.dy.data(), alone.dx.data(), nullptr, LK_AUTO,
                   2);
      lk_gradients(&shape, c.x.data(), nullptr, c.dy.data(), nullptr, alone.dweight.data(), LK_AUTO,
                   2);
      if (!same(alone.dx, automatic.dx) || !same(alone.dweight, automatic.dweight))
        fail("one gradient alone differs: " + text(shape));
      Floats spectrum(lk_spectrum_floats(&shape), NAN);
      if (spectrum.empty() != (lk_choose(&shape, LK_FORWARD_CACHED) == LK_DIRECT))
        fail("spectrum size: " + text(shape));
      if (spectrum.empty()) continue;
      Results cached(c);
      if (lk_make_spectrum(&shape, c.weight.data(), spectrum.data(), 3) != LK_OK ||
          lk_forward_cached(&shape, c.x.data(), spectrum.data(), c.bias.data(), cached.y.data(),
                            2) != LK_OK ||
          !same(cached.y, compute(c, LK_FFT, 2).y))
        fail("a cached spectrum changes the result: " + text(shape));
    }
  }
}

// Linear in the weight: a central difference is the gradient but for rounding.
void check_finite_differences() {
  const lk_shape shape = {2, 3, 6, 5, 7};
  const Case c(shape, 11);
  for (int algorithm : {LK_DIRECT, LK_FFT}) {
    const Results r = compute(c, algorithm, 2);
    for (size_t i = 0; i < c.weight.size(); i += 5) {
      Case up = c, down = c;
      up.weight[i] += 0.5f;
      down.weight[i] -= 0.5f;
      const double slope = inner(compute(up, algorithm, 2).y, c.dy) -
                           inner(compute(down, algorithm, 2).y, c.dy);
      note("finite differences", fabs(slope - r.dweight[i]) / (1 + fabs(slope)), 1e-4, text(shape));
    }
  }
}

void check_concurrent_calls() {
  std::vector<Case> cases;
  std::vector<Results> wanted;
  for (const lk_shape& shape : kShapes) {
    cases.push_back(Case(shape, 13));
    wanted.push_back(compute(cases.back(), LK_AUTO, 1));
  }
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (size_t i = 0; i < 3 * cases.size(); ++i) {
        const size_t n = (i + t) % cases.size();
        wrong[t] += !same(compute(cases[n], LK_AUTO, 1 + t), wanted[n]);
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (int count : wrong)
    if (count) fail("calls from several threads disturb each other");
}

#if !defined(__SANITIZE_THREAD__)  // which does not support threads started in a forked child
// A child forked after the pool was started, and a child of that child.
int check_fork(int depth) {
  const Case c(kShapes[1], 17);
  const Results wanted = compute(c, LK_AUTO, 2);
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    const int before = failures;
    for (int i = 0; i < 3; ++i)
      if (!same(compute(c, LK_AUTO, 3), wanted)) fail("wrong result in a forked child");
    if (depth < 2) check_fork(depth + 1);
    fflush(stdout);
    _exit(failures != before);
  }
  int status = 1;
  if (child < 0 || waitpid(child, &status, 0) != child || status != 0) fail("forked child");
  if (!same(compute(c, LK_AUTO, 2), wanted)) fail("wrong result after a fork");
  return 0;
}
#endif

// Output and gradients of a 1x1 convolution.
struct Products {
  Floats y, dx, dweight;
};

Products multiply(const pw_shape& s, const Floats& x, const Floats& weight, const Floats& dy,
                  int threads) {
  Products p = {Floats(dy.size(), NAN), Floats(x.size(), NAN), Floats(weight.size(), NAN)};
  if (pw_forward(&s, x.data(), weight.data(), p.y.data(), threads) != LK_OK ||
      pw_gradients(&s, x.data(), weight.data(), dy.data(), p.dx.data(), p.dweight.data(),
                   threads) != LK_OK)
    fail("a 1x1 convolution");
  return p;
}

void check_pointwise() {
  if (!pw_available()) return fail("no stand-in for oneDNN");
  // One tile, tiles cut in both directions with a rest, several images, single values.
  for (const pw_shape& s : {pw_shape{1, 5, 7, 9}, pw_shape{1, 33, 150, 700}, pw_shape{5, 19, 70, 49},
                            pw_shape{3, 1, 1, 1}, pw_shape{0, 3, 4, 5}}) {
    std::mt19937 random(19);
    std::normal_distribution<float> normal;
    Floats x(s.batch * s.in_channels * s.pixels), weight(s.out_channels * s.in_channels),
        dy(s.batch * s.out_channels * s.pixels);
    for (Floats* values : {&x, &weight, &dy})
      for (float& value : *values) value = normal(random);
    std::vector<double> y(dy.size()), dx(x.size()), dweight(weight.size());
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t o = 0; o < s.out_channels; ++o)
        for (int64_t i = 0; i < s.in_channels; ++i)
          for (int64_t p = 0; p < s.pixels; ++p) {
            const int64_t in = (b * s.in_channels + i) * s.pixels + p;
            const int64_t out = (b * s.out_channels + o) * s.pixels + p;
            const double w = weight[o * s.in_channels + i];
            y[out] += w * x[in];
            dx[in] += w * dy[out];
            dweight[o * s.in_channels + i] += static_cast<double>(x[in]) * dy[out];
          }
    const Products one = multiply(s, x, weight, dy, 1);
    const std::string where = "with " + std::to_string(s.pixels) + " pixels";
    note("1x1 y", relative_error(one.y, y), 2e-6, where);
    note("1x1 dx", relative_error(one.dx, dx), 2e-6, where);
    note("1x1 dweight", relative_error(one.dweight, dweight), 2e-6, where);
    std::vector<std::thread> threads;
    std::vector<int> wrong(4);
    for (int t = 0; t < 4; ++t)
      threads.emplace_back([&, t] {
        const Products many = multiply(s, x, weight, dy, 2 * t + 1);
        wrong[t] = !same(many.y, one.y) || !same(many.dx, one.dx) ||
                   !same(many.dweight, one.dweight);
      });
    for (std::thread& thread : threads) thread.join();
    for (int bad : wrong)
      if (bad) fail("other bits of a 1x1 convolution with more threads");
  }
}

void check_bad_arguments() {
  const lk_shape good = {1, 2, 4, 4, 3};
  Floats x(32), w(18), y(32), dw(18, NAN);
  const auto forward = [&](lk_shape s, int algorithm, int threads) {
    return lk_forward(&s, x.data(), w.data(), nullptr, y.data(), algorithm, threads);
  };
  if (forward(good, LK_AUTO, 1) != LK_OK) fail("a good call");
  for (int kernel : {-3, 0, 1, 2, 4, 64, 65}) {
    lk_shape s = good;
    s.kernel = kernel;
    if (forward(s, LK_AUTO, 1) != LK_BAD_ARGUMENT) fail("bad kernel accepted");
  }
  for (int64_t lk_shape::*size : {&lk_shape::channels, &lk_shape::height, &lk_shape::width})
    for (int64_t value : {int64_t(-1), int64_t(0), std::numeric_limits<int64_t>::max()}) {
      lk_shape s = good;
      s.*size = value;
      if (forward(s, LK_AUTO, 1) != LK_BAD_ARGUMENT) fail("bad size accepted");
    }
  if (forward(good, 3, 1) != LK_BAD_ARGUMENT || forward(good, -1, 1) != LK_BAD_ARGUMENT ||
      forward(good, LK_AUTO, 0) != LK_BAD_ARGUMENT)
    fail("bad algorithm or threads accepted");
  if (lk_forward(nullptr, x.data(), w.data(), nullptr, y.data(), 0, 1) != LK_BAD_ARGUMENT ||
      lk_forward(&good, nullptr, w.data(), nullptr, y.data(), 0, 1) != LK_BAD_ARGUMENT ||
      lk_gradients(&good, x.data(), w.data(), nullptr, nullptr, dw.data(), 0, 1) !=
          LK_BAD_ARGUMENT)
    fail("null pointer accepted");
  if (lk_set_isa(-1) != LK_BAD_ARGUMENT || lk_set_isa(9) != LK_BAD_ARGUMENT)
    fail("unknown instruction set accepted");
  lk_shape empty = good;
  empty.batch = 0;
  if (forward(empty, LK_AUTO, 1) != LK_OK ||
      lk_gradients(&empty, nullptr, w.data(), nullptr, nullptr, dw.data(), 0, 1) != LK_OK ||
      !same(dw, Floats(18, 0.0f)))
    fail("empty batch");
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? atoi(argv[1]) : 500;
  const unsigned seed = argc > 2 ? static_cast<unsigned>(atoi(argv[2])) : 1;
  const int best = lk_isa();
  const std::vector<int> sets = instruction_sets();
  std::mt19937 random(seed);

  for (const lk_shape& shape : kShapes) check_shape(shape, seed, sets);
  if (count >= 100)
    for (const lk_shape& shape : kLarge) check_shape(shape, seed, sets);
  for (int i = 0; i < count; ++i) check_shape(random_shape(random), random(), sets);
  check_agreement(sets);
  check_threads(sets);
  lk_set_isa(best);
  check_finite_differences();
  check_concurrent_calls();
  check_pointwise();
#if !defined(__SANITIZE_THREAD__)
  check_fork(0);
#endif
  check_bad_arguments();

  for (const auto& entry : worst) printf("%-30s %.2g\n", entry.first.c_str(), entry.second);
  if (!(lk_peak_gflops(1) > 0)) fail("peak");
  printf("%d shapes, %s: %s\n", count, kIsaNames[lk_isa()], failures ? "FAILED" : "passed");
  return failures != 0;
}
