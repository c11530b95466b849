// Stands for oneDNN in csrc_test.cpp, which is about how products are cut up and shared out.
#include <stdint.h>

extern "C" int dnnl_sgemm(char transa, char transb, int64_t m, int64_t n, int64_t k, float alpha,
                          const float* a, int64_t lda, const float* b, int64_t ldb, float beta,
                          float* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < k; ++p)
        sum += static_cast<double>(transa == 'T' ? a[p * lda + i] : a[i * lda + p]) *
               (transb == 'T' ? b[j * ldb + p] : b[p * ldb + j]);
      c[i * ldc + j] = static_cast<float>(alpha * sum + (beta == 0 ? 0 : beta * c[i * ldc + j]));
    }
  return 0;
}
