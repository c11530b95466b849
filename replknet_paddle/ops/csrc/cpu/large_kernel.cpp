#include "../large_kernel.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <chrono>
#include <limits>

#include "kernels.h"
#include "plan.h"
#include "pool.h"
#include "rule.h"

namespace lk {
namespace {

// ---- instruction set ---------------------------------------------------------------------------

const Kernels* kernels_of(int isa) {
  switch (isa) {
    case LK_PORTABLE: return &kPortableKernels;
#ifdef LK_X86
    case LK_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kAvx2Kernels
                                                                              : nullptr;
    case LK_AVX512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("fma")
                 ? &kAvx512Kernels
                 : nullptr;
#endif
  }
  return nullptr;
}

int best_isa() {
  int isa = LK_AVX512;
  while (!kernels_of(isa)) --isa;
  return isa;
}

std::atomic<int>& isa_in_use() {
  static std::atomic<int> isa{best_isa()};
  return isa;
}

const Kernels& kernels() { return *kernels_of(isa_in_use().load(std::memory_order_relaxed)); }

// ---- jobs --------------------------------------------------------------------------------------

// Scratch memory is kept from call to call: fresh memory costs a page fault per 4 KiB, which would
// take longer than a small layer.
class Scratch {
 public:
  ~Scratch() { free(memory_); }

  float* get(size_t floats) {
    if (floats > floats_) {
      free(memory_);
      memory_ = nullptr;
      floats_ = 0;
      void* fresh = nullptr;
      if (posix_memalign(&fresh, 64, floats * sizeof(float))) return nullptr;
      memory_ = static_cast<float*>(fresh);
      floats_ = floats;
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  size_t floats_ = 0;
};

float* scratch(size_t floats) {
  static thread_local Scratch scratch;
  return scratch.get(floats);
}

struct Job {
  typedef void (*Body)(const Job&, int64_t unit, float* workspace);
  const Kernels* kernels;
  Task task;
  int form;           // of the direct convolution
  int gradient_form;  // of its weight gradient
  Body body;
  size_t workspace;
  int64_t groups;
  int64_t chunks;  // per group, of the batch
  std::atomic<bool> failed{false};
};

void run_unit(void* context, int64_t unit) {
  Job& job = *static_cast<Job*>(context);
  float* workspace = scratch(job.workspace);
  if (workspace) {
    job.body(job, unit, workspace);
  } else {
    job.failed.store(true);
  }
}

int run(Job& job, int threads) {
  Pool::run(threads, job.groups * job.chunks, run_unit, &job);
  return job.failed.load() ? LK_NO_MEMORY : LK_OK;
}

int64_t groups_of(const lk_shape& s, const Kernels& k) {
  return (s.channels + k.lanes - 1) / k.lanes;
}

// What is prepared per group (the weight's spectrum) pays the more, the more images share it; the
// batch is cut only where there are too few groups to keep the threads busy.
int64_t chunks_of(const lk_shape& s, int64_t groups, int threads) {
  int64_t chunks = (2 * static_cast<int64_t>(threads) + groups - 1) / groups;
  if (threads <= 1 || groups % threads == 0) chunks = 1;
  return chunks < s.batch ? chunks : s.batch;
}

void forward_unit(const Job& job, int64_t unit, float* workspace) {
  const int64_t group = unit / job.chunks, chunk = unit % job.chunks;
  job.kernels->fft_forward(job.task, group, chunk * job.task.batch / job.chunks,
                           (chunk + 1) * job.task.batch / job.chunks, workspace);
}

void direct_forward_unit(const Job& job, int64_t unit, float* workspace) {
  const int64_t group = unit / job.chunks, chunk = unit % job.chunks;
  job.kernels->direct_forward(job.task, job.form, group, chunk * job.task.batch / job.chunks,
                              (chunk + 1) * job.task.batch / job.chunks, workspace);
}

void direct_gradients_unit(const Job& job, int64_t group, float* workspace) {
  if (job.task.dx) job.kernels->direct_input_gradient(job.task, job.form, group, workspace);
  if (job.task.dweight)
    job.kernels->direct_weight_gradient(job.task, job.gradient_form, group, workspace);
}

void gradients_unit(const Job& job, int64_t group, float* workspace) {
  job.kernels->fft_gradients(job.task, group, workspace);
}

void spectrum_unit(const Job& job, int64_t group, float* workspace) {
  job.kernels->fft_spectrum(job.task, group, workspace);
}

bool valid(const lk_shape* s) {
  if (!s || s->batch < 0 || s->channels < 1 || s->height < 1 || s->width < 1) return false;
  if (s->height > 1 << 24 || s->width > 1 << 24) return false;
  if (s->kernel < 3 || s->kernel > 63 || s->kernel % 2 == 0) return false;
  // Sizes in bytes must fit.
  const int64_t most = std::numeric_limits<int64_t>::max() / 8;
  if (s->width > most / s->height) return false;
  if (s->channels > most / (s->height * s->width)) return false;
  if (s->channels > most / (s->kernel * s->kernel)) return false;
  return s->batch == 0 || s->channels * s->height * s->width <= most / s->batch;
}

bool valid(int algorithm, int threads) {
  return algorithm >= LK_AUTO && algorithm <= LK_FFT && threads >= 1;
}

void describe(const lk_shape& s, Task* task) {
  *task = Task();
  task->batch = s.batch;
  task->channels = s.channels;
  task->height = s.height;
  task->width = s.width;
  task->kernel = s.kernel;
}

}  // namespace
}  // namespace lk

using namespace lk;

int lk_forward(const lk_shape* s, const float* x, const float* weight, const float* bias, float* y,
               int algorithm, int threads) {
  if (!valid(s) || !valid(algorithm, threads) || !weight) return LK_BAD_ARGUMENT;
  if (s->batch == 0) return LK_OK;
  if (!x || !y) return LK_BAD_ARGUMENT;
  Job job;
  job.kernels = &kernels();
  describe(*s, &job.task);
  job.task.x = x;
  job.task.weight = weight;
  job.task.bias = bias;
  job.task.y = y;
  if (algorithm == LK_AUTO) algorithm = lk_choose(s, LK_FORWARD);
  if (algorithm == LK_FFT) {
    job.task.plan = make_plan(s->height, s->width, s->kernel);
    job.body = forward_unit;
    job.workspace = job.kernels->fft_workspace_floats(job.task);
  } else {
    job.form = direct_form(*s, job.kernels->lanes, false);
    job.body = direct_forward_unit;
    job.workspace = job.kernels->direct_workspace_floats(job.task, job.form);
  }
  job.groups = groups_of(*s, *job.kernels);
  job.chunks = chunks_of(*s, job.groups, threads);
  return run(job, threads);
}

int lk_gradients(const lk_shape* s, const float* x, const float* weight, const float* dy, float* dx,
                 float* dweight, int algorithm, int threads) {
  if (!valid(s) || !valid(algorithm, threads)) return LK_BAD_ARGUMENT;
  if ((dx && !weight) || (s->batch > 0 && (!dy || (dweight && !x)))) return LK_BAD_ARGUMENT;
  if (!dx && !dweight) return LK_OK;
  if (s->batch == 0) {
    if (dweight)
      memset(dweight, 0, sizeof(float) * static_cast<size_t>(s->channels * s->kernel * s->kernel));
    return LK_OK;
  }
  Job job;
  job.kernels = &kernels();
  describe(*s, &job.task);
  job.task.x = x;
  job.task.weight = weight;
  job.task.dy = dy;
  job.task.dx = dx;
  job.task.dweight = dweight;
  if (algorithm == LK_AUTO) algorithm = lk_choose(s, LK_GRADIENTS);
  if (algorithm == LK_FFT) {
    job.task.plan = make_plan(s->height, s->width, s->kernel);
    job.body = gradients_unit;
    job.workspace = job.kernels->fft_workspace_floats(job.task);
  } else {
    job.form = direct_form(*s, job.kernels->lanes, false);
    job.gradient_form = direct_form(*s, job.kernels->lanes, true);
    job.body = direct_gradients_unit;
    job.workspace = job.kernels->direct_workspace_floats(job.task, job.form);
    const size_t other = job.kernels->direct_workspace_floats(job.task, job.gradient_form);
    if (other > job.workspace) job.workspace = other;
  }
  job.groups = groups_of(*s, *job.kernels);
  job.chunks = 1;
  return run(job, threads);
}

int64_t lk_spectrum_floats(const lk_shape* s) {
  if (!valid(s) || lk_choose(s, LK_FORWARD_CACHED) != LK_FFT) return 0;
  Task task;
  describe(*s, &task);
  task.plan = make_plan(s->height, s->width, s->kernel);
  const Kernels& k = kernels();
  return groups_of(*s, k) * static_cast<int64_t>(k.fft_spectrum_floats(task));
}

int lk_make_spectrum(const lk_shape* s, const float* weight, float* spectrum, int threads) {
  if (!valid(s) || !valid(LK_AUTO, threads) || !weight || !spectrum) return LK_BAD_ARGUMENT;
  Job job;
  job.kernels = &kernels();
  describe(*s, &job.task);
  job.task.weight = weight;
  job.task.spectrum_out = spectrum;
  job.task.plan = make_plan(s->height, s->width, s->kernel);
  job.body = spectrum_unit;
  job.workspace = job.kernels->fft_workspace_floats(job.task);
  job.groups = groups_of(*s, *job.kernels);
  job.chunks = 1;
  return run(job, threads);
}

int lk_forward_cached(const lk_shape* s, const float* x, const float* spectrum, const float* bias,
                      float* y, int threads) {
  if (!valid(s) || !valid(LK_AUTO, threads) || !spectrum) return LK_BAD_ARGUMENT;
  if (s->batch == 0) return LK_OK;
  if (!x || !y) return LK_BAD_ARGUMENT;
  Job job;
  job.kernels = &kernels();
  describe(*s, &job.task);
  job.task.x = x;
  job.task.spectrum = spectrum;
  job.task.bias = bias;
  job.task.y = y;
  job.task.plan = make_plan(s->height, s->width, s->kernel);
  job.body = forward_unit;
  job.workspace = job.kernels->fft_workspace_floats(job.task);
  job.groups = groups_of(*s, *job.kernels);
  job.chunks = chunks_of(*s, job.groups, threads);
  return run(job, threads);
}

int lk_choose(const lk_shape* s, int pass) {
  if (!valid(s)) return LK_DIRECT;
  const int lanes = kernels().lanes;
  double direct = direct_estimate(*s, direct_form(*s, lanes, false), lanes, false);
  if (pass == LK_GRADIENTS)
    direct += direct_estimate(*s, direct_form(*s, lanes, true), lanes, true);
  // Estimates of the direct forms are per group of channels, as are those of the transforms.
  return fft_estimate(*s, pass) < direct ? LK_FFT : LK_DIRECT;
}

int lk_isa(void) { return isa_in_use().load(std::memory_order_relaxed); }

int lk_set_isa(int isa) {
  if (!kernels_of(isa)) return LK_BAD_ARGUMENT;
  isa_in_use().store(isa, std::memory_order_relaxed);
  return LK_OK;
}

double lk_peak_gflops(int threads) {
  struct Measurement {
    const Kernels* kernels;
    std::atomic<int64_t> operations;
    std::chrono::steady_clock::time_point end;
  } m = {&kernels(), {0}, std::chrono::steady_clock::now() + std::chrono::milliseconds(50)};
  const auto start = std::chrono::steady_clock::now();
  Pool::run(threads < 1 ? 1 : threads, threads < 1 ? 1 : threads,
            [](void* context, int64_t) {
              Measurement& m = *static_cast<Measurement*>(context);
              double operations = 0;
              while (std::chrono::steady_clock::now() < m.end)
                operations += m.kernels->multiply_add(10000);
              m.operations.fetch_add(static_cast<int64_t>(operations));
            },
            &m);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return static_cast<double>(m.operations.load()) / seconds.count() / 1e9;
}
