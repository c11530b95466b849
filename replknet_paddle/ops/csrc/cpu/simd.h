// Vectors of LK_LANES floats.  Included inside the namespace of one instruction set; no function of
// the standard library may be instantiated here, since the linker would share the copy made for
// this instruction set with the rest of the program.

#define LK_INLINE inline __attribute__((always_inline))
#define LK_UNROLL _Pragma("GCC unroll 16")

enum { L = LK_LANES };

typedef float V __attribute__((vector_size(4 * LK_LANES)));
typedef float UnalignedV __attribute__((vector_size(4 * LK_LANES), aligned(4), may_alias));

LK_INLINE V load(const float* p) { return *reinterpret_cast<const UnalignedV*>(p); }
LK_INLINE void store(float* p, V v) { *reinterpret_cast<UnalignedV*>(p) = v; }

template <typename T>
LK_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
LK_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}

#if LK_LANES == 16

LK_INLINE V broadcast(float s) { return _mm512_set1_ps(s); }
LK_INLINE V zero() { return _mm512_setzero_ps(); }
LK_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }   // a b + c
LK_INLINE V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b

// The first n lanes, 0 <= n < L; the others are zero, or left alone, and their memory not touched.
LK_INLINE V load_first(const float* p, int n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
LK_INLINE void store_first(float* p, V v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
}

LK_INLINE void transpose(V* r) {
  V t[16];
  LK_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  LK_UNROLL for (int i = 0; i < 16; i += 4) {
    LK_UNROLL for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + 2 + j]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  LK_UNROLL for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
  }
  LK_UNROLL for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_f32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_f32x4(t[j], t[8 + j], 0xdd);
  }
}

#elif LK_LANES == 8

LK_INLINE V broadcast(float s) { return _mm256_set1_ps(s); }
LK_INLINE V zero() { return _mm256_setzero_ps(); }
LK_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
LK_INLINE V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }

LK_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LK_INLINE V load_first(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
LK_INLINE void store_first(float* p, V v, int n) { _mm256_maskstore_ps(p, first_lanes(n), v); }

LK_INLINE void transpose(V* r) {
  V t[8];
  LK_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  LK_UNROLL for (int i = 0; i < 8; i += 4) {
    LK_UNROLL for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
    }
  }
  LK_UNROLL for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
    t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
  }
  LK_UNROLL for (int j = 0; j < 8; ++j) r[j] = t[j];
}

#else

LK_INLINE V zero() { return V{}; }
LK_INLINE V broadcast(float s) { return V{s, s, s, s}; }
LK_INLINE V fma(V a, V b, V c) { return a * b + c; }
LK_INLINE V fnma(V a, V b, V c) { return c - a * b; }

LK_INLINE V load_first(const float* p, int n) {
  V v = zero();
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
LK_INLINE void store_first(float* p, V v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}

LK_INLINE void transpose(V* r) {
  LK_UNROLL for (int i = 0; i < 4; ++i) {
    LK_UNROLL for (int j = 0; j < i; ++j) {
      const float s = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = s;
    }
  }
}

#endif

// The first n lanes, 0 <= n <= L.
LK_INLINE V load_lanes(const float* p, int n) { return n == L ? load(p) : load_first(p, n); }

// Sum of all lanes, always in the same order.
LK_INLINE float sum_lanes(V v) {
  float s[L];
  store(s, v);
  for (int n = L / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) s[i] += s[i + n];
  return s[0];
}

// A plane per channel -> the channels of a group side by side: to[j * L + c] = from[c * stride + j]
// for j < n.  Lanes without a channel are zero.
inline void interleave(const float* from, int64_t stride, int channels, int64_t n, float* to) {
  for (int64_t j = 0; j < n; j += L) {
    const int m = static_cast<int>(smaller<int64_t>(L, n - j));
    V r[L];
    if (m == L && channels == L) {
      LK_UNROLL for (int c = 0; c < L; ++c) r[c] = load(from + c * stride + j);
    } else {
      LK_UNROLL for (int c = 0; c < L; ++c) {
        r[c] = c >= channels ? zero()
               : m == L      ? load(from + c * stride + j)
                             : load_first(from + c * stride + j, m);
      }
    }
    transpose(r);
    if (m == L) {
      LK_UNROLL for (int i = 0; i < L; ++i) store(to + (j + i) * L, r[i]);
    } else {
      LK_UNROLL for (int i = 0; i < L; ++i) {
        if (i < m) store(to + (j + i) * L, r[i]);
      }
    }
  }
}

// And back.
inline void deinterleave(const float* from, int64_t stride, int channels, int64_t n, float* to) {
  for (int64_t j = 0; j < n; j += L) {
    const int m = static_cast<int>(smaller<int64_t>(L, n - j));
    V r[L];
    LK_UNROLL for (int i = 0; i < L; ++i) r[i] = i < m ? load(from + (j + i) * L) : zero();
    transpose(r);
    if (m == L && channels == L) {
      LK_UNROLL for (int c = 0; c < L; ++c) store(to + c * stride + j, r[c]);
    } else {
      LK_UNROLL for (int c = 0; c < L; ++c) {
        if (c >= channels) continue;
        if (m == L) {
          store(to + c * stride + j, r[c]);
        } else {
          store_first(to + c * stride + j, r[c], m);
        }
      }
    }
  }
}
