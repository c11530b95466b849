// Direct convolution.  Included inside the namespace of one instruction set.
//
// Three ways to fill a vector and its registers:
//   planar   A vector is a piece of a row.  No rearrangement but a zero border left and right; for
//            small kernels on maps of some width.
//   sliding  A vector is one pixel of a group of channels; otherwise like planar.  For small
//            kernels on small maps.
//   banded   A vector is one pixel of a group of channels, and a row of the result is a band matrix
//            times a row of samples, in blocks of T x T: 2 T loads and T * T multiply-adds, and
//            nothing is spent on taps beyond the map's edge, which for a kernel as large as the map
//            is half of them in each direction.
// In all of them rows beyond the map's edge are skipped.
//
// Long sums are made of sums of about kShortSum terms, since a float32 sum loses digits with its
// length: a 63 x 63 kernel has 3969 terms, a weight's gradient as many as the batch has pixels.

enum { kShortSum = 128 };

// ---- planar and sliding --------------------------------------------------------------------------

// Vector j of the result's row i is the sum over taps (u, v) of weight(u, v) times the samples at
// x + (i + u - kernel_rows / 2) * x_row + j * L + v * TAP.  TAP is 1 (planar: the weight is one
// number) or L (sliding: a vector of weights).
struct Slide {
  const float* x;
  ptrdiff_t x_row;
  int height;
  int kernel_rows, kernel_cols;
  const float* weight;
  V offset;
  float* out;
  ptrdiff_t out_row;
  int vectors;
  int tail;  // lanes of a row's last vector
};

template <int TAP>
LK_INLINE V tap_weight(const float* weight, ptrdiff_t tap) {
  return TAP == 1 ? broadcast(weight[tap]) : load(weight + tap * TAP);
}

// One tap of a row of samples, for those results LO..HI of R rows that it matters to.
template <int TAP, int LO, int HI, int NJ>
LK_INLINE void slide_tap(const Slide& s, const float* x, int t, int cols, int v, V (*acc)[NJ]) {
  V xv[NJ];
  LK_UNROLL for (int n = 0; n < NJ; ++n) xv[n] = load(x + n * L + v * TAP);
  LK_UNROLL for (int a = LO; a <= HI; ++a) {
    const V w = tap_weight<TAP>(s.weight, static_cast<ptrdiff_t>(t - a) * cols + v);
    LK_UNROLL for (int n = 0; n < NJ; ++n) acc[a][n] = fma(xv[n], w, acc[a][n]);
  }
}

template <int TAP, int COLS, int LO, int HI, int NJ>
LK_INLINE void slide_row(const Slide& s, const float* x, int t, V (*acc)[NJ]) {
  if (COLS) {
    LK_UNROLL for (int v = 0; v < COLS; ++v) slide_tap<TAP, LO, HI, NJ>(s, x, t, COLS, v, acc);
  } else {
    for (int v = 0; v < s.kernel_cols; ++v)
      slide_tap<TAP, LO, HI, NJ>(s, x, t, s.kernel_cols, v, acc);
  }
}

template <int TAP, int COLS, int R, int NJ>
void slide_block(const Slide& s, int i0, int j0) {
  V acc[R][NJ], total[R][NJ];
  LK_UNROLL for (int a = 0; a < R; ++a) {
    LK_UNROLL for (int n = 0; n < NJ; ++n) {
      acc[a][n] = s.offset;
      total[a][n] = zero();
    }
  }
  const int rows = s.kernel_rows, above = i0 - rows / 2;
  const int first = larger(0, -above), last = smaller(R + rows - 1, s.height - above);
  int terms = 0;
  for (int t = first; t < last; ++t) {
    if (!COLS && (terms += s.kernel_cols) > kShortSum) {
      LK_UNROLL for (int a = 0; a < R; ++a) {
        LK_UNROLL for (int n = 0; n < NJ; ++n) {
          total[a][n] += acc[a][n];
          acc[a][n] = zero();
        }
      }
      terms = s.kernel_cols;
    }
    const float* x = s.x + (above + t) * s.x_row + static_cast<ptrdiff_t>(j0) * L;
    // Result i0 + a takes kernel row t - a.
    const int lo = larger(0, t - rows + 1), hi = smaller(R - 1, t);
#define LK_CASE(LO, HI)                                                                \
  case (LO) * 8 + (HI):                                                                \
    slide_row<TAP, COLS, (LO < R ? LO : R - 1), (HI < R ? HI : R - 1), NJ>(s, x, t, acc); \
    break;
    switch (lo * 8 + hi) {
      LK_CASE(0, 0)
      LK_CASE(0, 1)
      LK_CASE(0, 2)
      LK_CASE(0, 3)
      LK_CASE(1, 1)
      LK_CASE(1, 2)
      LK_CASE(1, 3)
      LK_CASE(2, 2)
      LK_CASE(2, 3)
      LK_CASE(3, 3)
    }
#undef LK_CASE
  }
  LK_UNROLL for (int a = 0; a < R; ++a) {
    LK_UNROLL for (int n = 0; n < NJ; ++n) {
      float* out = s.out + (i0 + a) * s.out_row + static_cast<ptrdiff_t>(j0 + n) * L;
      const V sum = COLS ? acc[a][n] : total[a][n] + acc[a][n];
      if (j0 + n < s.vectors - 1 || s.tail == L) {
        store(out, sum);
      } else {
        store_first(out, sum, s.tail);
      }
    }
  }
}

template <int TAP, int COLS, int R>
void slide_rows(const Slide& s, int i0) {
  int j = 0;
  for (; j + 2 <= s.vectors; j += 2) slide_block<TAP, COLS, R, 2>(s, i0, j);
  if (j < s.vectors) slide_block<TAP, COLS, R, 1>(s, i0, j);
}

template <int TAP, int COLS>
void slide_plane(const Slide& s) {
  if (s.height < 4) {
    for (int i = 0; i < s.height; ++i) slide_rows<TAP, 0, 1>(s, i);
    return;
  }
  // The last rows may be computed twice.
  for (int i = 0; i < s.height; i += 4) slide_rows<TAP, COLS, 4>(s, smaller(i, s.height - 4));
}

template <int TAP>
void slide(const Slide& s) {
  switch (s.kernel_cols) {
    case 3: return slide_plane<TAP, 3>(s);
    case 5: return slide_plane<TAP, 5>(s);
    default: return slide_plane<TAP, 0>(s);
  }
}

// The weight's gradient: sum(u, v) += sum over i, j of g(i, j) x(i + u - kernel_rows / 2, j, v), with
// x as above and vector j of g's row i at g + i * g_row + j * L.
struct SlideGradient {
  const float *x, *g;
  ptrdiff_t x_row, g_row;
  int height, vectors;
  int kernel_rows, kernel_cols;
  const float* zeros;  // a row of g
  float* sum;          // kernel_rows x kernel_cols vectors
};

// Taps (u0 .. u0 + NU - 1, v0 .. v0 + NV - 1).
template <int TAP, int NU, int NV>
void slide_gradient_block(const SlideGradient& s, int u0, int v0) {
  const int shift = u0 - s.kernel_rows / 2;  // row i of g meets row i + shift + a of x
  const int first = larger(0, shift), last = smaller(s.height, s.height + shift + NU - 1);
  const int step = larger(1, kShortSum / s.vectors);
  for (int r0 = first; r0 < last; r0 += step) {
    V acc[NU][NV];
    LK_UNROLL for (int a = 0; a < NU; ++a) {
      LK_UNROLL for (int b = 0; b < NV; ++b) acc[a][b] = zero();
    }
    for (int r = r0; r < smaller(r0 + step, last); ++r) {
      const float* g[NU];
      LK_UNROLL for (int a = 0; a < NU; ++a) {
        const int i = r - shift - a;
        g[a] = i >= 0 && i < s.height ? s.g + i * s.g_row : s.zeros;
      }
      const float* x = s.x + r * s.x_row + v0 * TAP;
      for (int j = 0; j < s.vectors; ++j) {
        V gv[NU];
        LK_UNROLL for (int a = 0; a < NU; ++a) gv[a] = load(g[a] + static_cast<ptrdiff_t>(j) * L);
        LK_UNROLL for (int b = 0; b < NV; ++b) {
          const V xv = load(x + static_cast<ptrdiff_t>(j) * L + b * TAP);
          LK_UNROLL for (int a = 0; a < NU; ++a) acc[a][b] = fma(gv[a], xv, acc[a][b]);
        }
      }
    }
    LK_UNROLL for (int a = 0; a < NU; ++a) {
      LK_UNROLL for (int b = 0; b < NV; ++b) {
        float* sum = s.sum + ((u0 + a) * static_cast<ptrdiff_t>(s.kernel_cols) + v0 + b) * L;
        store(sum, load(sum) + acc[a][b]);
      }
    }
  }
}

// An odd number of rows or columns is a sum of threes and fours, or 1.
LK_INLINE int piece(int rest) { return rest == 1 || rest == 5 ? 1 : rest % 4 == 0 ? 4 : 3; }

template <int TAP, int NU>
void slide_gradient_rows(const SlideGradient& s, int u) {
  for (int v = 0; v < s.kernel_cols; v += piece(s.kernel_cols - v)) {
    switch (piece(s.kernel_cols - v)) {
      case 1: slide_gradient_block<TAP, NU, 1>(s, u, v); break;
      case 3: slide_gradient_block<TAP, NU, 3>(s, u, v); break;
      default: slide_gradient_block<TAP, NU, 4>(s, u, v);
    }
  }
}

template <int TAP>
void slide_gradient(const SlideGradient& s) {
  if (s.kernel_rows == 5 && s.kernel_cols == 5) {  // 31 registers of 32, where there are so many
    slide_gradient_block<TAP, 5, 5>(s, 0, 0);
    return;
  }
  for (int u = 0; u < s.kernel_rows; u += piece(s.kernel_rows - u)) {
    switch (piece(s.kernel_rows - u)) {
      case 1: slide_gradient_rows<TAP, 1>(s, u); break;
      case 3: slide_gradient_rows<TAP, 3>(s, u); break;
      default: slide_gradient_rows<TAP, 4>(s, u);
    }
  }
}

// ---- banded --------------------------------------------------------------------------------------

// Rows of x are `padded` pixels long, a multiple of T, and zero from width on; rows of the weight
// have 2 T zeros in front of and behind their 2 radius_x + 1 taps.
struct Band {
  int height, width, padded;
  int radius_y, radius_x;
  const float *x, *g;
  float* weight;  // or the sum of its gradient
  V offset;
  float* out;
};

LK_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

LK_INLINE int band_taps(int radius, int block) { return 2 * radius + 1 + 4 * block; }

// The distances between blocks of T results and T samples that have taps in common.
LK_INLINE int reach(int radius, int block) { return (radius + block - 1) / block * block; }

template <int T>
void band_forward(const Band& s) {
  const int taps = band_taps(s.radius_x, T), blocks = reach(s.radius_x, T);
  for (int i = 0; i < s.height; ++i) {
    const int first_row = larger(0, i - s.radius_y);
    const int last_row = smaller(s.height - 1, i + s.radius_y);
    for (int a0 = 0; a0 < s.padded; a0 += T) {
      const int first = larger(0, a0 - blocks), last = smaller(s.padded - T, a0 + blocks);
      V acc[T], total[T];
      LK_UNROLL for (int a = 0; a < T; ++a) {
        acc[a] = zero();
        total[a] = s.offset;
      }
      int terms = 0;
      for (int r = first_row; r <= last_row; ++r) {
        const float* x = s.x + static_cast<ptrdiff_t>(r) * s.padded * L;
        const float* weight =
            s.weight + ((r - i + s.radius_y) * static_cast<ptrdiff_t>(taps) + 2 * T +
                        s.radius_x - a0) * L;
        for (int b0 = first; b0 <= last; b0 += T) {
          V xv[T];
          LK_UNROLL for (int b = 0; b < T; ++b) xv[b] = load(x + (b0 + b) * L);
          LK_UNROLL for (int d = 1 - T; d < T; ++d) {
            const V w = load(weight + (b0 + d) * L);
            LK_UNROLL for (int b = 0; b < T; ++b) {
              if (b - d >= 0 && b - d < T) acc[b - d] = fma(xv[b], w, acc[b - d]);
            }
          }
        }
        if ((terms += last + T - first) > kShortSum || r == last_row) {
          LK_UNROLL for (int a = 0; a < T; ++a) {
            total[a] += acc[a];
            acc[a] = zero();
          }
          terms = 0;
        }
      }
      float* out = s.out + (static_cast<ptrdiff_t>(i) * s.width + a0) * L;
      LK_UNROLL for (int a = 0; a < T; ++a) {
        if (a0 + a < s.width) store(out + a * L, total[a]);
      }
    }
  }
}

template <int T>
void band_gradient(const Band& s) {
  const int taps = band_taps(s.radius_x, T), blocks = reach(s.radius_x, T);
  for (int u = -s.radius_y; u <= s.radius_y; ++u) {
    const int first_row = larger(0, -u), last_row = smaller(s.height, s.height - u);
    for (int e = -blocks; e <= blocks; e += T) {
      const int first = larger(0, -e), last = smaller(s.padded, s.padded - e);
      if (first >= last) continue;
      const int step = larger(1, kShortSum / (last - first));
      for (int i0 = first_row; i0 < last_row; i0 += step) {
        V acc[2 * T - 1];
        LK_UNROLL for (int d = 0; d < 2 * T - 1; ++d) acc[d] = zero();
        for (int i = i0; i < smaller(i0 + step, last_row); ++i) {
          const float* g = s.g + static_cast<ptrdiff_t>(i) * s.padded * L;
          const float* x = s.x + (static_cast<ptrdiff_t>(i + u) * s.padded + e) * L;
          for (int j = first; j < last; j += T) {
            V gv[T];
            LK_UNROLL for (int a = 0; a < T; ++a) gv[a] = load(g + (j + a) * L);
            LK_UNROLL for (int b = 0; b < T; ++b) {
              const V xv = load(x + (j + b) * L);
              LK_UNROLL for (int a = 0; a < T; ++a) {
                acc[b - a + T - 1] = fma(gv[a], xv, acc[b - a + T - 1]);
              }
            }
          }
        }
        float* sum = s.weight + ((u + s.radius_y) * static_cast<ptrdiff_t>(taps) + 2 * T +
                                 s.radius_x + e - (T - 1)) * L;
        LK_UNROLL for (int d = 0; d < 2 * T - 1; ++d) {
          store(sum + d * L, load(sum + d * L) + acc[d]);
        }
      }
    }
  }
}

void band_forward(int block, const Band& s) {
  switch (block) {
    case 5: return band_forward<5>(s);
    case 6: return band_forward<6>(s);
    case 7: return band_forward<7>(s);
    default: return band_forward<8>(s);
  }
}

void band_gradient(int block, const Band& s) {
  switch (block) {
    case 5: return band_gradient<5>(s);
    case 6: return band_gradient<6>(s);
    case 7: return band_gradient<7>(s);
    default: return band_gradient<8>(s);
  }
}

// ---- one group of channels -----------------------------------------------------------------------

// What a group needs in memory, and how it is arranged.
struct Direct {
  int form;
  int height, width, kernel;
  int radius_y, radius_x;     // without taps that never meet the map
  int block;                  // banded
  int margin;                 // floats before a row of x
  ptrdiff_t x_row, g_row;     // floats from row to row
  int rows, cols;             // of the weight as arranged
  size_t x_floats, g_floats, out_floats, weight_floats, plain_floats;
  float *x, *g, *out, *weight, *sum, *plain, *zeros;
};

LK_INLINE float* take(float*& memory, size_t floats) {
  float* taken = memory;
  memory += (floats + 31) / 16 * 16;
  return taken;
}

LK_INLINE void clear(float* p, size_t floats) {
  for (size_t i = 0; i < floats; ++i) p[i] = 0.0f;
}

Direct arrange(const Task& task, int form, float* memory, size_t* used) {
  Direct d;
  d.form = form;
  d.height = static_cast<int>(task.height);
  d.width = static_cast<int>(task.width);
  d.kernel = task.kernel;
  d.radius_y = smaller(task.kernel / 2, d.height - 1);
  d.radius_x = smaller(task.kernel / 2, d.width - 1);
  d.block = band_block_of(d.width);
  d.rows = 2 * d.radius_y + 1;
  d.cols = 2 * d.radius_x + 1;
  const size_t height = d.height;
  d.plain_floats = larger<size_t>(height * d.width, static_cast<size_t>(d.kernel) * d.kernel) * L;
  if (form == kPlanar) {
    d.margin = round_up(d.radius_x, L);
    d.g_row = round_up(d.width, L);
    d.x_row = d.margin + d.g_row + round_up(d.radius_x, L);
    d.out_floats = 0;
    d.plain_floats = 0;
  } else if (form == kSliding) {
    d.margin = d.radius_x * L;
    d.g_row = static_cast<ptrdiff_t>(d.width) * L;
    d.x_row = d.g_row + 2 * d.margin;
    d.out_floats = height * d.width * L;
  } else {
    d.margin = 0;
    d.x_row = d.g_row = static_cast<ptrdiff_t>(round_up(d.width, d.block)) * L;
    d.cols = band_taps(d.radius_x, d.block);
    d.out_floats = height * d.width * L;
  }
  d.x_floats = height * d.x_row;
  d.g_floats = height * d.g_row;
  d.weight_floats = static_cast<size_t>(d.rows) * d.cols * L;
  float* at = memory;
  d.x = take(at, d.x_floats);
  d.g = take(at, d.g_floats);
  d.out = take(at, d.out_floats);
  d.weight = take(at, d.weight_floats);
  d.sum = take(at, d.weight_floats);
  d.plain = take(at, d.plain_floats);
  d.zeros = take(at, d.g_row);
  *used = at - memory;
  return d;
}

size_t direct_workspace_floats(const Task& task, int form) {
  float nothing;
  size_t used;
  arrange(task, form, &nothing, &used);
  return used;
}

// A plane (planar), or the planes of a group, into rows `row` floats apart.
void put_samples(const Direct& d, const float* plane, int channels, float* rows, ptrdiff_t row) {
  const int64_t area = static_cast<int64_t>(d.height) * d.width;
  if (d.form == kPlanar) {
    for (int i = 0; i < d.height; ++i)
      for (int j = 0; j < d.width; j += L) {
        const float* from = plane + static_cast<int64_t>(i) * d.width + j;
        float* to = rows + i * row + j;
        if (j + L <= d.width) {
          store(to, load(from));
        } else {
          store_first(to, load_first(from, d.width - j), d.width - j);
        }
      }
  } else if (row == static_cast<ptrdiff_t>(d.width) * L) {
    interleave(plane, area, channels, area, rows);
  } else {
    interleave(plane, area, channels, area, d.plain);
    for (int i = 0; i < d.height; ++i)
      for (int j = 0; j < d.width; ++j)
        store(rows + i * row + j * L, load(d.plain + (static_cast<ptrdiff_t>(i) * d.width + j) * L));
  }
}

// The weight of one channel (planar) or a group, turned by 180 degrees for the input's gradient.
void put_weight(const Direct& d, const float* weight, int channels, bool flip) {
  const int k = d.kernel, top = k / 2 - d.radius_y, left = k / 2 - d.radius_x;
  const int taps = 2 * d.radius_x + 1, last = d.rows * taps - 1;
  if (d.form == kPlanar) {
    for (int u = 0; u < d.rows; ++u)
      for (int v = 0; v < taps; ++v) {
        const int tap = u * taps + v;
        d.weight[flip ? last - tap : tap] = weight[(top + u) * k + left + v];
      }
    return;
  }
  interleave(weight, static_cast<int64_t>(k) * k, channels, static_cast<int64_t>(k) * k, d.plain);
  if (d.form == kBanded) clear(d.weight, d.weight_floats);
  const int front = (d.cols - taps) / 2;
  for (int u = 0; u < d.rows; ++u)
    for (int v = 0; v < taps; ++v) {
      const int to_u = flip ? d.rows - 1 - u : u, to_v = flip ? taps - 1 - v : v;
      store(d.weight + (static_cast<ptrdiff_t>(to_u) * d.cols + front + to_v) * L,
            load(d.plain + (static_cast<ptrdiff_t>(top + u) * k + left + v) * L));
    }
}

// Where the sum of the weight's gradient goes.
void get_weight(const Direct& d, int channels, float* weight) {
  const int k = d.kernel, top = k / 2 - d.radius_y, left = k / 2 - d.radius_x;
  const int taps = 2 * d.radius_x + 1, front = (d.cols - taps) / 2;
  float* to = d.form == kPlanar ? weight : d.plain;
  const int lanes = d.form == kPlanar ? 1 : L;
  if (d.rows < k || taps < k) clear(to, static_cast<size_t>(k) * k * lanes);
  for (int u = 0; u < d.rows; ++u)
    for (int v = 0; v < taps; ++v) {
      const V sum = load(d.sum + (static_cast<ptrdiff_t>(u) * d.cols + front + v) * L);
      float* at = to + (static_cast<ptrdiff_t>(top + u) * k + left + v) * lanes;
      if (d.form == kPlanar) {
        *at = sum_lanes(sum);
      } else {
        store(at, sum);
      }
    }
  if (d.form != kPlanar)
    deinterleave(d.plain, static_cast<int64_t>(k) * k, channels, static_cast<int64_t>(k) * k,
                 weight);
}

// The samples in `x` (rows x_row apart) times the arranged weight.
void convolve(const Direct& d, const float* x, int channels, V offset, float* plane) {
  const int64_t area = static_cast<int64_t>(d.height) * d.width;
  if (d.form == kBanded) {
    const Band s = {d.height,   d.width, static_cast<int>(d.x_row / L), d.radius_y, d.radius_x, x,
                    nullptr,    d.weight, offset,                       d.out};
    band_forward(d.block, s);
  } else {
    Slide s = {x + d.margin, d.x_row,  d.height, d.rows, d.cols, d.weight, offset, d.out,
               static_cast<ptrdiff_t>(d.width) * L, d.width, L};
    if (d.form == kPlanar) {
      s.x -= d.radius_x;
      s.out = plane;
      s.out_row = d.width;
      s.vectors = (d.width + L - 1) / L;
      s.tail = d.width - (s.vectors - 1) * L;
      slide<1>(s);
      return;
    }
    s.x -= d.margin;
    slide<L>(s);
  }
  deinterleave(d.out, area, channels, area, plane);
}

void correlate(const Direct& d) {
  if (d.form == kBanded) {
    const Band s = {d.height, d.width, static_cast<int>(d.x_row / L), d.radius_y, d.radius_x, d.x,
                    d.g,      d.sum,   zero(),                        nullptr};
    band_gradient(d.block, s);
    return;
  }
  SlideGradient s = {d.x,     d.g,    d.x_row, d.g_row, d.height, d.width,
                     d.rows,  d.cols, d.zeros, d.sum};
  if (d.form == kPlanar) {
    s.x += d.margin - d.radius_x;
    s.vectors = (d.width + L - 1) / L;
    slide_gradient<1>(s);
  } else {
    slide_gradient<L>(s);
  }
}

// Images [first, last) of a group.  Planar takes its channels one by one, the others all at once.
void direct_forward(const Task& task, int form, int64_t group, int64_t first, int64_t last,
                    float* memory) {
  size_t used;
  const Direct d = arrange(task, form, memory, &used);
  const int64_t area = task.height * task.width, k2 = static_cast<int64_t>(task.kernel) * task.kernel;
  const int channels = group_channels(task, group), step = form == kPlanar ? 1 : channels;
  clear(d.x, d.x_floats);
  for (int64_t c = group * L; c < group * L + channels; c += step) {
    put_weight(d, task.weight + c * k2, channels, false);
    const V offset = !task.bias       ? zero()
                     : form == kPlanar ? broadcast(task.bias[c])
                                       : load_lanes(task.bias + c, channels);
    for (int64_t image = first; image < last; ++image) {
      const int64_t plane = (image * task.channels + c) * area;
      put_samples(d, task.x + plane, channels, d.x + d.margin, d.x_row);
      convolve(d, d.x, channels, offset, task.y + plane);
    }
  }
}

// The input's gradient: as forward, of dy with the weight turned round.
void direct_input_gradient(const Task& task, int form, int64_t group, float* memory) {
  size_t used;
  const Direct d = arrange(task, form, memory, &used);
  const int64_t area = task.height * task.width, k2 = static_cast<int64_t>(task.kernel) * task.kernel;
  const int channels = group_channels(task, group), step = form == kPlanar ? 1 : channels;
  clear(d.x, d.x_floats);
  for (int64_t c = group * L; c < group * L + channels; c += step) {
    put_weight(d, task.weight + c * k2, channels, true);
    for (int64_t image = 0; image < task.batch; ++image) {
      const int64_t plane = (image * task.channels + c) * area;
      put_samples(d, task.dy + plane, channels, d.x + d.margin, d.x_row);
      convolve(d, d.x, channels, zero(), task.dx + plane);
    }
  }
}

void direct_weight_gradient(const Task& task, int form, int64_t group, float* memory) {
  size_t used;
  const Direct d = arrange(task, form, memory, &used);
  const int64_t area = task.height * task.width, k2 = static_cast<int64_t>(task.kernel) * task.kernel;
  const int channels = group_channels(task, group), step = form == kPlanar ? 1 : channels;
  clear(d.x, d.x_floats);
  clear(d.g, d.g_floats);
  clear(d.zeros, d.g_row);
  for (int64_t c = group * L; c < group * L + channels; c += step) {
    clear(d.sum, d.weight_floats);
    for (int64_t image = 0; image < task.batch; ++image) {
      const int64_t plane = (image * task.channels + c) * area;
      put_samples(d, task.x + plane, channels, d.x + d.margin, d.x_row);
      put_samples(d, task.dy + plane, channels, d.g, d.g_row);
      correlate(d);
    }
    get_weight(d, channels, task.dweight + c * k2);
  }
}
