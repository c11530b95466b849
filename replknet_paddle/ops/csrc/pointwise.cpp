#include "pointwise.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>

#include "cpu/pool.h"

namespace {

// Of oneDNN's C interface: row-major C = alpha op(A) op(B) + beta C, 0 for success.
typedef int (*Sgemm)(char transa, char transb, int64_t m, int64_t n, int64_t k, float alpha,
                     const float* a, int64_t lda, const float* b, int64_t ldb, float beta,
                     float* c, int64_t ldc);

Sgemm find_sgemm() {
  void* library = dlopen("libdnnl.so.3", RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<Sgemm>(dlsym(library, "dnnl_sgemm")) : nullptr;
}

Sgemm sgemm() {
  static const Sgemm found = find_sgemm();
  return found;
}

// Keeps oneDNN from starting OpenMP threads below ours, on the thread where it lives: OpenMP's
// setting is each thread's own.
class SingleThreadedOpenMP {
 public:
  SingleThreadedOpenMP() {
    for (int i = 0; i < kRuntimes; ++i) {
      before_[i] = runtimes()[i].get ? runtimes()[i].get() : 1;
      if (before_[i] != 1) runtimes()[i].set(1);
    }
  }
  ~SingleThreadedOpenMP() {
    for (int i = 0; i < kRuntimes; ++i) {
      if (before_[i] != 1) runtimes()[i].set(before_[i]);
    }
  }

 private:
  static const int kRuntimes = 2;
  struct Runtime {
    int (*get)();
    void (*set)(int);
  };
  static const Runtime* runtimes() {
    static const Runtime found[kRuntimes] = {find("libiomp5.so"), find("libgomp.so.1")};
    return found;
  }
  static Runtime find(const char* name) {
    Runtime runtime = {nullptr, nullptr};
    if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) {
      runtime.get = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_max_threads"));
      runtime.set = reinterpret_cast<void (*)(int)>(dlsym(library, "omp_set_num_threads"));
    }
    if (!runtime.set) runtime.get = nullptr;
    return runtime;
  }
  int before_[kRuntimes];
};

// Keeps signals waiting while oneDNN computes.  Up to 3.11.1 its products have the stack pointer in
// their workspace on the heap (oneDNN's issue 4845), where the frame of a signal would overwrite
// whatever lies below.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

struct Matrix {
  const float* data;
  int64_t item;    // from one batch item to the next
  int64_t stride;  // from one row to the next, as it lies in memory
  bool transposed;

  const float* at(int64_t row, int64_t column) const {
    return transposed ? data + column * stride + row : data + row * stride + column;
  }
};

// C = A B for every batch item or, where `sum` is set, C = the sum of A B over the batch.
struct Product {
  Matrix a, b;
  float* c;
  int64_t batch, rows, columns, inner;
  bool sum;
  int64_t tile_rows, tile_columns;
  std::atomic<int> status;

  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  // Tiles small enough for many cores, large enough to be worth packing.
  void cut() {
    tile_rows = rows;
    tile_columns = ceil_div(columns, ceil_div(columns, 1024));
    while (units() < 16 && tile_rows > 64) tile_rows = ceil_div(ceil_div(tile_rows, 2), 16) * 16;
    while (units() < 16 && tile_columns > 256) {
      tile_columns = ceil_div(ceil_div(tile_columns, 2), 16) * 16;
    }
  }
  int64_t tiles() const {
    return ceil_div(rows, tile_rows) * ceil_div(columns, tile_columns);
  }
  int64_t units() const { return tiles() * (sum ? 1 : batch); }

  void unit(int64_t index) {
    const int64_t across = ceil_div(columns, tile_columns);
    const int64_t item = index / tiles(), tile = index % tiles();
    const int64_t row = tile / across * tile_rows, column = tile % across * tile_columns;
    const int64_t m = std::min(tile_rows, rows - row);
    const int64_t n = std::min(tile_columns, columns - column);
    float* out = c + (sum ? 0 : item * rows * columns) + row * columns + column;
    const int64_t first = sum ? 0 : item, last = sum ? batch : item + 1;
    const SingleThreadedOpenMP single;
    const SignalsBlocked blocked;
    for (int64_t i = first; i < last; ++i) {
      const int failed = sgemm()(a.transposed ? 'T' : 'N', b.transposed ? 'T' : 'N', m, n, inner,
                                 1.0f, a.at(row, 0) + i * a.item, a.stride,
                                 b.at(0, column) + i * b.item, b.stride, i > first ? 1.0f : 0.0f,
                                 out, columns);
      if (failed) status = LK_NO_MEMORY;  // all else has been checked
    }
  }

  int run(int threads) {
    status = LK_OK;
    cut();
    lk::Pool::run(
        threads, units(),
        [](void* self, int64_t index) { static_cast<Product*>(self)->unit(index); }, this);
    return status;
  }
};

bool is_good(const pw_shape* s) {
  return s && sgemm() && s->batch >= 0 && s->in_channels > 0 && s->out_channels > 0 &&
         s->pixels > 0;
}

}  // namespace

extern "C" int pw_available(void) { return sgemm() != nullptr; }

extern "C" int pw_forward(const pw_shape* s, const float* x, const float* weight, float* y,
                          int threads) {
  if (!is_good(s) || !weight || threads < 1) return LK_BAD_ARGUMENT;
  if (s->batch == 0) return LK_OK;  // an empty map may lie nowhere
  if (!x || !y) return LK_BAD_ARGUMENT;
  Product product;
  product.a = {weight, 0, s->in_channels, false};
  product.b = {x, s->in_channels * s->pixels, s->pixels, false};
  product.c = y;
  product.batch = s->batch;
  product.rows = s->out_channels;
  product.columns = s->pixels;
  product.inner = s->in_channels;
  product.sum = false;
  return product.run(threads);
}

extern "C" int pw_gradients(const pw_shape* s, const float* x, const float* weight,
                            const float* dy, float* dx, float* dweight, int threads) {
  if (!is_good(s) || !weight || threads < 1) return LK_BAD_ARGUMENT;
  if (s->batch == 0) {
    if (dweight) std::fill(dweight, dweight + s->out_channels * s->in_channels, 0.0f);
    return LK_OK;
  }
  if (!x || !dy) return LK_BAD_ARGUMENT;
  Product product;
  product.batch = s->batch;
  if (dx) {
    product.a = {weight, 0, s->in_channels, true};
    product.b = {dy, s->out_channels * s->pixels, s->pixels, false};
    product.c = dx;
    product.rows = s->in_channels;
    product.columns = s->pixels;
    product.inner = s->out_channels;
    product.sum = false;
    if (const int status = product.run(threads)) return status;
  }
  if (!dweight) return LK_OK;
  product.a = {dy, s->out_channels * s->pixels, s->pixels, false};
  product.b = {x, s->in_channels * s->pixels, s->pixels, true};
  product.c = dweight;
  product.rows = s->out_channels;
  product.columns = s->in_channels;
  product.inner = s->pixels;
  product.sum = true;
  return product.run(threads);
}
