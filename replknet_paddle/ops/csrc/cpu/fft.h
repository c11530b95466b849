// Complex Fourier transforms of L channels side by side.  An element is L real parts followed by L
// imaginary parts, so that every butterfly is made of whole-vector operations without a shuffle.
// Included inside the namespace of one instruction set.
//
// The inverse transform needs no code of its own: exchanging real and imaginary parts before and
// after a forward transform inverts it (up to the factor n), so that the inverse passes call the
// same butterflies with the two arrays exchanged.

enum { ELEMENT = 2 * L };

// ---- butterflies: forward transforms of R elements in registers -------------------------------

LK_INLINE void butterfly2(V& ar, V& ai, V& br, V& bi) {
  const V r = ar - br, i = ai - bi;
  ar += br;
  ai += bi;
  br = r;
  bi = i;
}

LK_INLINE void butterfly3(V& ar, V& ai, V& br, V& bi, V& cr, V& ci) {
  const V half = broadcast(0.5f), sine = broadcast(0.866025403784438647f);
  const V sr = br + cr, si = bi + ci;
  const V dr = sine * (br - cr), di = sine * (bi - ci);
  const V mr = fnma(half, sr, ar), mi = fnma(half, si, ai);
  ar += sr;
  ai += si;
  br = mr + di;
  bi = mi - dr;
  cr = mr - di;
  ci = mi + dr;
}

LK_INLINE void butterfly4(V& ar, V& ai, V& br, V& bi, V& cr, V& ci, V& dr, V& di) {
  const V pr = ar + cr, pi = ai + ci, qr = ar - cr, qi = ai - ci;
  const V sr = br + dr, si = bi + di, tr = br - dr, ti = bi - di;
  ar = pr + sr;
  ai = pi + si;
  br = qr + ti;
  bi = qi - tr;
  cr = pr - sr;
  ci = pi - si;
  dr = qr - ti;
  di = qi + tr;
}

LK_INLINE void butterfly5(V& ar, V& ai, V& br, V& bi, V& cr, V& ci, V& dr, V& di, V& er, V& ei) {
  const V c1 = broadcast(0.309016994374947424f), c2 = broadcast(-0.809016994374947424f);
  const V s1 = broadcast(0.951056516295153572f), s2 = broadcast(0.587785252292473129f);
  const V t1r = br + er, t1i = bi + ei, t2r = cr + dr, t2i = ci + di;
  const V u1r = br - er, u1i = bi - ei, u2r = cr - dr, u2i = ci - di;
  const V m1r = fma(c2, t2r, fma(c1, t1r, ar)), m1i = fma(c2, t2i, fma(c1, t1i, ai));
  const V m2r = fma(c1, t2r, fma(c2, t1r, ar)), m2i = fma(c1, t2i, fma(c2, t1i, ai));
  const V n1r = fma(s2, u2r, s1 * u1r), n1i = fma(s2, u2i, s1 * u1i);
  const V n2r = fnma(s1, u2r, s2 * u1r), n2i = fnma(s1, u2i, s2 * u1i);
  ar += t1r + t2r;
  ai += t1i + t2i;
  br = m1r + n1i;
  bi = m1i - n1r;
  er = m1r - n1i;
  ei = m1i + n1r;
  cr = m2r + n2i;
  ci = m2i - n2r;
  dr = m2r - n2i;
  di = m2i + n2r;
}

// Multiplies by cos - i sin.
LK_INLINE void rotate(V& r, V& i, float cosine, float sine) {
  const V c = broadcast(cosine), s = broadcast(sine);
  const V t = fma(s, i, c * r);
  i = fnma(s, r, c * i);
  r = t;
}

template <int R>
struct Butterfly;

template <>
struct Butterfly<2> {
  static LK_INLINE void run(V* r, V* i) { butterfly2(r[0], i[0], r[1], i[1]); }
};

template <>
struct Butterfly<3> {
  static LK_INLINE void run(V* r, V* i) { butterfly3(r[0], i[0], r[1], i[1], r[2], i[2]); }
};

template <>
struct Butterfly<4> {
  static LK_INLINE void run(V* r, V* i) {
    butterfly4(r[0], i[0], r[1], i[1], r[2], i[2], r[3], i[3]);
  }
};

template <>
struct Butterfly<5> {
  static LK_INLINE void run(V* r, V* i) {
    butterfly5(r[0], i[0], r[1], i[1], r[2], i[2], r[3], i[3], r[4], i[4]);
  }
};

template <>
struct Butterfly<7> {
  static LK_INLINE void run(V* r, V* i) {
    const V c1 = broadcast(0.623489801858733531f), c2 = broadcast(-0.222520933956314404f),
            c3 = broadcast(-0.900968867902419126f);
    const V s1 = broadcast(0.781831482468029809f), s2 = broadcast(0.974927912181823607f),
            s3 = broadcast(0.433883739117558120f);
    const V t1r = r[1] + r[6], t1i = i[1] + i[6], u1r = r[1] - r[6], u1i = i[1] - i[6];
    const V t2r = r[2] + r[5], t2i = i[2] + i[5], u2r = r[2] - r[5], u2i = i[2] - i[5];
    const V t3r = r[3] + r[4], t3i = i[3] + i[4], u3r = r[3] - r[4], u3i = i[3] - i[4];
    const V m1r = fma(c3, t3r, fma(c2, t2r, fma(c1, t1r, r[0])));
    const V m1i = fma(c3, t3i, fma(c2, t2i, fma(c1, t1i, i[0])));
    const V m2r = fma(c1, t3r, fma(c3, t2r, fma(c2, t1r, r[0])));
    const V m2i = fma(c1, t3i, fma(c3, t2i, fma(c2, t1i, i[0])));
    const V m3r = fma(c2, t3r, fma(c1, t2r, fma(c3, t1r, r[0])));
    const V m3i = fma(c2, t3i, fma(c1, t2i, fma(c3, t1i, i[0])));
    const V n1r = fma(s3, u3r, fma(s2, u2r, s1 * u1r)), n1i = fma(s3, u3i, fma(s2, u2i, s1 * u1i));
    const V n2r = fnma(s1, u3r, fnma(s3, u2r, s2 * u1r)),
            n2i = fnma(s1, u3i, fnma(s3, u2i, s2 * u1i));
    const V n3r = fma(s2, u3r, fnma(s1, u2r, s3 * u1r)),
            n3i = fma(s2, u3i, fnma(s1, u2i, s3 * u1i));
    r[0] += t1r + t2r + t3r;
    i[0] += t1i + t2i + t3i;
    r[1] = m1r + n1i;
    i[1] = m1i - n1r;
    r[6] = m1r - n1i;
    i[6] = m1i + n1r;
    r[2] = m2r + n2i;
    i[2] = m2i - n2r;
    r[5] = m2r - n2i;
    i[5] = m2i + n2r;
    r[3] = m3r + n3i;
    i[3] = m3i - n3r;
    r[4] = m3r - n3i;
    i[4] = m3i + n3r;
  }
};

// Coprime factors, R = A B (Good and Thomas): index B a + A b in, and out the frequency that is
// ka modulo A and kb modulo B.  No factors in between.
template <>
struct Butterfly<6> {
  static LK_INLINE void run(V* r, V* i) {
    butterfly3(r[0], i[0], r[2], i[2], r[4], i[4]);
    butterfly3(r[3], i[3], r[5], i[5], r[1], i[1]);
    butterfly2(r[0], i[0], r[3], i[3]);  // frequencies 0 and 3
    butterfly2(r[2], i[2], r[5], i[5]);  // 4 and 1
    butterfly2(r[4], i[4], r[1], i[1]);  // 2 and 5
    const V r1 = r[5], i1 = i[5], r2 = r[4], i2 = i[4], r4 = r[2], i4 = i[2], r5 = r[1], i5 = i[1];
    r[1] = r1;
    i[1] = i1;
    r[2] = r2;
    i[2] = i2;
    r[4] = r4;
    i[4] = i4;
    r[5] = r5;
    i[5] = i5;
  }
};

template <>
struct Butterfly<10> {
  static LK_INLINE void run(V* r, V* i) {
    butterfly5(r[0], i[0], r[2], i[2], r[4], i[4], r[6], i[6], r[8], i[8]);
    butterfly5(r[5], i[5], r[7], i[7], r[9], i[9], r[1], i[1], r[3], i[3]);
    butterfly2(r[0], i[0], r[5], i[5]);  // frequencies 0 and 5
    butterfly2(r[2], i[2], r[7], i[7]);  // 6 and 1
    butterfly2(r[4], i[4], r[9], i[9]);  // 2 and 7
    butterfly2(r[6], i[6], r[1], i[1]);  // 8 and 3
    butterfly2(r[8], i[8], r[3], i[3]);  // 4 and 9
    const V r1 = r[7], i1 = i[7], r2 = r[4], i2 = i[4], r3 = r[1], i3 = i[1], r4 = r[8], i4 = i[8];
    const V r6 = r[2], i6 = i[2], r7 = r[9], i7 = i[9], r8 = r[6], i8 = i[6], r9 = r[3], i9 = i[3];
    r[1] = r1;
    i[1] = i1;
    r[2] = r2;
    i[2] = i2;
    r[3] = r3;
    i[3] = i3;
    r[4] = r4;
    i[4] = i4;
    r[6] = r6;
    i[6] = i6;
    r[7] = r7;
    i[7] = i7;
    r[8] = r8;
    i[8] = i8;
    r[9] = r9;
    i[9] = i9;
  }
};

template <>
struct Butterfly<12> {
  static LK_INLINE void run(V* r, V* i) {
    V a[12], b[12];
    LK_UNROLL for (int k = 0; k < 3; ++k) {
      // Samples 4 k + 3 j, j = 0..3.
      const int j0 = 4 * k, j1 = (4 * k + 3) % 12, j2 = (4 * k + 6) % 12, j3 = (4 * k + 9) % 12;
      butterfly4(r[j0], i[j0], r[j1], i[j1], r[j2], i[j2], r[j3], i[j3]);
    }
    LK_UNROLL for (int j = 0; j < 4; ++j) {
      const int k0 = 3 * j, k1 = (4 + 3 * j) % 12, k2 = (8 + 3 * j) % 12;
      butterfly3(r[k0], i[k0], r[k1], i[k1], r[k2], i[k2]);
      LK_UNROLL for (int k = 0; k < 3; ++k) {
        a[(4 * k + 9 * j) % 12] = r[(4 * k + 3 * j) % 12];
        b[(4 * k + 9 * j) % 12] = i[(4 * k + 3 * j) % 12];
      }
    }
    LK_UNROLL for (int k = 0; k < 12; ++k) {
      r[k] = a[k];
      i[k] = b[k];
    }
  }
};

template <>
struct Butterfly<8> {
  static LK_INLINE void run(V* r, V* i) {
    butterfly4(r[0], i[0], r[2], i[2], r[4], i[4], r[6], i[6]);
    butterfly4(r[1], i[1], r[3], i[3], r[5], i[5], r[7], i[7]);
    const V half = broadcast(0.707106781186547524f);
    V t = half * (r[3] + i[3]);  // (1 - i) / sqrt 2
    i[3] = half * (i[3] - r[3]);
    r[3] = t;
    t = i[5];                    // -i
    i[5] = -r[5];
    r[5] = t;
    t = half * (i[7] - r[7]);    // (-1 - i) / sqrt 2
    i[7] = -half * (i[7] + r[7]);
    r[7] = t;
    butterfly2(r[0], i[0], r[1], i[1]);  // frequencies 0 and 4
    butterfly2(r[2], i[2], r[3], i[3]);  // 1 and 5
    butterfly2(r[4], i[4], r[5], i[5]);  // 2 and 6
    butterfly2(r[6], i[6], r[7], i[7]);  // 3 and 7
    const V r1 = r[2], i1 = i[2], r2 = r[4], i2 = i[4], r3 = r[6], i3 = i[6];
    const V r4 = r[1], i4 = i[1], r5 = r[3], i5 = i[3], r6 = r[5], i6 = i[5];
    r[1] = r1;
    i[1] = i1;
    r[2] = r2;
    i[2] = i2;
    r[3] = r3;
    i[3] = i3;
    r[4] = r4;
    i[4] = i4;
    r[5] = r5;
    i[5] = i5;
    r[6] = r6;
    i[6] = i6;
  }
};

template <>
struct Butterfly<9> {
  static LK_INLINE void run(V* r, V* i) {
    LK_UNROLL for (int k = 0; k < 3; ++k) {
      butterfly3(r[k], i[k], r[k + 3], i[k + 3], r[k + 6], i[k + 6]);
    }
    const float c1 = 0.766044443118978035f, s1 = 0.642787609686539326f;
    const float c2 = 0.173648177666930349f, s2 = 0.984807753012208059f;
    const float c4 = -0.939692620785908384f, s4 = 0.342020143325668733f;
    rotate(r[4], i[4], c1, s1);
    rotate(r[5], i[5], c2, s2);
    rotate(r[7], i[7], c2, s2);
    rotate(r[8], i[8], c4, s4);
    V a[9], b[9];
    LK_UNROLL for (int k = 0; k < 3; ++k) {
      butterfly3(r[3 * k], i[3 * k], r[3 * k + 1], i[3 * k + 1], r[3 * k + 2], i[3 * k + 2]);
      LK_UNROLL for (int j = 0; j < 3; ++j) {
        a[3 * j + k] = r[3 * k + j];
        b[3 * j + k] = i[3 * k + j];
      }
    }
    LK_UNROLL for (int k = 0; k < 9; ++k) {
      r[k] = a[k];
      i[k] = b[k];
    }
  }
};

// ---- passes ------------------------------------------------------------------------------------

// Which samples a transform has: sample (k + shift) mod n at place k if that is below count, and
// zero elsewhere.
struct Wrapped {
  int shift, count;
};

template <int R>
LK_INLINE void multiply_twiddles(V* r, V* i, const float* twiddle) {
  LK_UNROLL for (int q = 1; q < R; ++q) {
    const V c = broadcast(twiddle[2 * q - 2]), s = broadcast(twiddle[2 * q - 1]);
    const V t = fnma(s, i[q], c * r[q]);
    i[q] = fma(s, r[q], c * i[q]);
    r[q] = t;
  }
}

// The first forward pass, which also gathers the samples.
template <int R>
void first_pass(const float* real, const float* imag, ptrdiff_t stride, Wrapped samples, int n,
                int span, const float* twiddle, float* out) {
  for (int p = 0; p < span; ++p) {
    V r[R], i[R];
    LK_UNROLL for (int q = 0; q < R; ++q) {
      int k = p + q * span + samples.shift;
      if (k >= n) k -= n;
      if (k < samples.count) {
        r[q] = load(real + k * stride);
        i[q] = load(imag + k * stride);
      } else {
        r[q] = i[q] = zero();
      }
    }
    Butterfly<R>::run(r, i);
    multiply_twiddles<R>(r, i, twiddle + p * 2 * (R - 1));
    LK_UNROLL for (int q = 0; q < R; ++q) {
      store(out + (p + q * span) * ELEMENT, r[q]);
      store(out + (p + q * span) * ELEMENT + L, i[q]);
    }
  }
}

template <int R>
void inner_pass(float* data, int n, int span, const float* twiddle) {
  for (int block = 0; block < n; block += R * span)
    for (int p = 0; p < span; ++p) {
      float* at = data + (block + p) * ELEMENT;
      V r[R], i[R];
      LK_UNROLL for (int q = 0; q < R; ++q) {
        r[q] = load(at + q * span * ELEMENT);
        i[q] = load(at + q * span * ELEMENT + L);
      }
      Butterfly<R>::run(r, i);
      multiply_twiddles<R>(r, i, twiddle + p * 2 * (R - 1));
      LK_UNROLL for (int q = 0; q < R; ++q) {
        store(at + q * span * ELEMENT, r[q]);
        store(at + q * span * ELEMENT + L, i[q]);
      }
    }
}

// The last forward pass and the first inverse one (the same, but for the exchanged parts): R
// neighbours, no twiddle factors.
template <int R>
void end_pass(float* real, float* imag, int n) {
  for (int k = 0; k < n * ELEMENT; k += R * ELEMENT) {
    V r[R], i[R];
    LK_UNROLL for (int q = 0; q < R; ++q) {
      r[q] = load(real + k + q * ELEMENT);
      i[q] = load(imag + k + q * ELEMENT);
    }
    Butterfly<R>::run(r, i);
    LK_UNROLL for (int q = 0; q < R; ++q) {
      store(real + k + q * ELEMENT, r[q]);
      store(imag + k + q * ELEMENT, i[q]);
    }
  }
}

// Last forward pass, product with the conjugate of a spectrum, first inverse pass, all at once.
template <int R>
void product_pass(float* data, const float* spectrum, int n) {
  for (int k = 0; k < n * ELEMENT; k += R * ELEMENT) {
    V r[R], i[R];
    LK_UNROLL for (int q = 0; q < R; ++q) {
      r[q] = load(data + k + q * ELEMENT);
      i[q] = load(data + k + q * ELEMENT + L);
    }
    Butterfly<R>::run(r, i);
    LK_UNROLL for (int q = 0; q < R; ++q) {
      const V c = load(spectrum + k + q * ELEMENT), s = load(spectrum + k + q * ELEMENT + L);
      const V t = fma(s, i[q], c * r[q]);
      i[q] = fnma(s, r[q], c * i[q]);
      r[q] = t;
    }
    Butterfly<R>::run(i, r);
    LK_UNROLL for (int q = 0; q < R; ++q) {
      store(data + k + q * ELEMENT, r[q]);
      store(data + k + q * ELEMENT + L, i[q]);
    }
  }
}

template <int R>
void inner_inverse_pass(float* data, int n, int span, const float* twiddle) {
  for (int block = 0; block < n; block += R * span)
    for (int p = 0; p < span; ++p) {
      float* at = data + (block + p) * ELEMENT;
      V r[R], i[R];
      LK_UNROLL for (int q = 0; q < R; ++q) {
        r[q] = load(at + q * span * ELEMENT);
        i[q] = load(at + q * span * ELEMENT + L);
      }
      multiply_twiddles<R>(i, r, twiddle + p * 2 * (R - 1));
      Butterfly<R>::run(i, r);
      LK_UNROLL for (int q = 0; q < R; ++q) {
        store(at + q * span * ELEMENT, r[q]);
        store(at + q * span * ELEMENT + L, i[q]);
      }
    }
}

// The last inverse pass, which also scatters the samples, as scale * sample + offset.
template <int R>
void last_inverse_pass(const float* data, int n, int span, const float* twiddle, V scale, V offset,
                       float* real, float* imag, ptrdiff_t stride, Wrapped samples) {
  for (int p = 0; p < span; ++p) {
    V r[R], i[R];
    LK_UNROLL for (int q = 0; q < R; ++q) {
      r[q] = load(data + (p + q * span) * ELEMENT);
      i[q] = load(data + (p + q * span) * ELEMENT + L);
    }
    multiply_twiddles<R>(i, r, twiddle + p * 2 * (R - 1));
    Butterfly<R>::run(i, r);
    LK_UNROLL for (int q = 0; q < R; ++q) {
      int k = p + q * span + samples.shift;
      if (k >= n) k -= n;
      if (k < samples.count) {
        store(real + k * stride, fma(r[q], scale, offset));
        store(imag + k * stride, fma(i[q], scale, offset));
      }
    }
  }
}

struct Passes {
  void (*first)(const float*, const float*, ptrdiff_t, Wrapped, int, int, const float*, float*);
  void (*inner)(float*, int, int, const float*);
  void (*end)(float*, float*, int);
  void (*product)(float*, const float*, int);
  void (*inner_inverse)(float*, int, int, const float*);
  void (*last_inverse)(const float*, int, int, const float*, V, V, float*, float*, ptrdiff_t,
                       Wrapped);
};

#define LK_PASSES(R)                                                            \
  {                                                                             \
    first_pass<R>, inner_pass<R>, end_pass<R>, product_pass<R>,                 \
        inner_inverse_pass<R>, last_inverse_pass<R>                             \
  }
const Passes kPasses[13] = {
    {},           {},           LK_PASSES(2), LK_PASSES(3),  LK_PASSES(4), LK_PASSES(5),
    LK_PASSES(6), LK_PASSES(7), LK_PASSES(8), LK_PASSES(9),  LK_PASSES(10), {},
    LK_PASSES(12)};
#undef LK_PASSES

// All forward passes but the last.
LK_INLINE void begin_forward(const Transform& t, const float* real, const float* imag,
                             ptrdiff_t stride, Wrapped samples, float* out) {
  kPasses[t.radix[0]].first(real, imag, stride, samples, t.n, t.span[0], t.twiddle[0], out);
  for (int pass = 1; pass < t.passes - 1; ++pass)
    kPasses[t.radix[pass]].inner(out, t.n, t.span[pass], t.twiddle[pass]);
}

LK_INLINE void forward(const Transform& t, const float* real, const float* imag, ptrdiff_t stride,
                       Wrapped samples, float* out) {
  begin_forward(t, real, imag, stride, samples, out);
  kPasses[t.radix[t.passes - 1]].end(out, out + L, t.n);
}

// All inverse passes but the first.
LK_INLINE void finish_inverse(const Transform& t, float* data, V scale, V offset, float* real,
                              float* imag, ptrdiff_t stride, Wrapped samples) {
  for (int pass = t.passes - 2; pass > 0; --pass)
    kPasses[t.radix[pass]].inner_inverse(data, t.n, t.span[pass], t.twiddle[pass]);
  kPasses[t.radix[0]].last_inverse(data, t.n, t.span[0], t.twiddle[0], scale, offset, real, imag,
                                   stride, samples);
}

LK_INLINE void inverse(const Transform& t, float* data, V scale, V offset, float* real,
                       float* imag, ptrdiff_t stride, Wrapped samples) {
  kPasses[t.radix[t.passes - 1]].end(data + L, data, t.n);
  finish_inverse(t, data, scale, offset, real, imag, stride, samples);
}
