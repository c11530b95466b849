// The convolution of one group of channels by two-dimensional real Fourier transforms.  Included
// inside the namespace of one instruction set, after fft.h.
//
// Rows are real: two of them make one complex transform, and only half of each spectrum is kept.
// Columns are then transformed, multiplied by the weight's column and transformed back one at a
// time, within the first-level cache; the full spectrum of a map exists nowhere.  Rows and columns
// that are zero or not wanted are neither transformed nor stored.
//
// With d the offset of a tap from the centre, X, W and G the spectra of the input, the weight
// (offset d at place d mod n) and the output's gradient:
//     y[i]  = sum_d x[i + d] w[d]    Y  = X conj(W)
//     dx[j] = sum_d g[j - d] w[d]    DX = G W
//     dw[d] = sum_j x[j] g[j - d]    DW = X conj(G)

// Part of a plane: `rows` x `cols` samples from `origin` on, one plane per channel.
struct Patch {
  int64_t plane, row;  // strides
  int channels;
  int rows, cols;
};

struct Workspace {
  float* line;      // two rows of samples, channels side by side
  float* scratch;   // one transform
  float* scratch2;
  float* rows;      // transformed rows
  float* rows2;
  float* weight;    // spectrum
  float* sum;       // spectrum of dw
};

LK_INLINE int window(const Axis& a) {
  const int64_t map = smaller<int64_t>(a.size, a.tile + 2 * a.radius);
  return static_cast<int>(larger<int64_t>(map, 2 * a.radius + 1));
}

size_t spectrum_floats(const Task& task) {
  return static_cast<size_t>(task.plan.columns) * task.plan.y.transform->n * ELEMENT;
}

// Laid out for the gradients, which need the most; the forward pass leaves parts unused.
size_t lay_out(const Task& task, float* memory, Workspace* w) {
  const FftPlan& plan = task.plan;
  size_t used = 0;
  const size_t line = 2 * static_cast<size_t>(window(plan.x)) * L;
  const size_t transform =
      static_cast<size_t>(larger(plan.y.transform->n, plan.x.transform->n)) * ELEMENT;
  const size_t rows = static_cast<size_t>(window(plan.y) + 1) * plan.row_stride * ELEMENT;
  const size_t spectrum = spectrum_floats(task);
  const bool gradients = task.dy != nullptr;
  float** const parts[] = {&w->line,  &w->scratch, &w->scratch2, &w->rows,
                           &w->rows2, &w->weight,  &w->sum};
  const size_t sizes[] = {line,
                          transform,
                          gradients ? transform : 0,
                          rows,
                          gradients && task.dweight ? rows : 0,
                          task.spectrum || task.spectrum_out ? 0 : spectrum,
                          gradients && task.dweight ? spectrum : 0};
  for (int i = 0; i < 7; ++i) {
    if (memory) *parts[i] = memory + used;
    used += (sizes[i] + 31) / 16 * 16;
  }
  return used;
}

size_t fft_workspace_floats(const Task& task) {
  Workspace unused;
  return lay_out(task, nullptr, &unused);
}

// Transforms the patch's rows: (rows, cols) real -> (rows, columns) complex, times 2.
void transform_rows(const FftPlan& plan, const float* origin, const Patch& patch, Wrapped samples,
                    const Workspace& w, float* rows) {
  const Transform& t = *plan.x.transform;
  const int n = t.n;
  for (int row = 0; row < patch.rows; row += 2) {
    const float* from = origin + row * patch.row;
    const bool pair = row + 1 < patch.rows;
    float* second = w.line + patch.cols * L;
    if (pair && patch.cols == patch.row) {
      interleave(from, patch.plane, patch.channels, 2 * patch.cols, w.line);
    } else {
      interleave(from, patch.plane, patch.channels, patch.cols, w.line);
      if (pair) {
        interleave(from + patch.row, patch.plane, patch.channels, patch.cols, second);
      } else {
        for (int j = 0; j < patch.cols; ++j) store(second + j * L, zero());
      }
    }
    forward(t, w.line, second, L, samples, w.scratch);
    float* a = rows + static_cast<ptrdiff_t>(row) * plan.row_stride * ELEMENT;
    float* b = a + static_cast<ptrdiff_t>(plan.row_stride) * ELEMENT;
    for (int k = 0; k < plan.columns; ++k) {
      const float* z = w.scratch + t.position[k] * ELEMENT;
      const float* c = w.scratch + t.position[k ? n - k : 0] * ELEMENT;
      const V zr = load(z), zi = load(z + L), cr = load(c), ci = load(c + L);
      store(a + k * ELEMENT, zr + cr);
      store(a + k * ELEMENT + L, zi - ci);
      if (pair) {
        store(b + k * ELEMENT, zi + ci);
        store(b + k * ELEMENT + L, cr - zr);
      }
    }
  }
}

// And back: rows of half spectra -> scale * samples + offset.
void restore_rows(const FftPlan& plan, const float* rows, Wrapped samples, V scale, V offset,
                  const Workspace& w, float* origin, const Patch& patch) {
  const Transform& t = *plan.x.transform;
  const int n = t.n;
  for (int row = 0; row < patch.rows; row += 2) {
    const bool pair = row + 1 < patch.rows;
    const float* a = rows + static_cast<ptrdiff_t>(row) * plan.row_stride * ELEMENT;
    const float* b = a + static_cast<ptrdiff_t>(plan.row_stride) * ELEMENT;
    for (int k = 0; k < plan.columns; ++k) {
      const V ar = load(a + k * ELEMENT), ai = load(a + k * ELEMENT + L);
      const V br = pair ? load(b + k * ELEMENT) : zero();
      const V bi = pair ? load(b + k * ELEMENT + L) : zero();
      float* z = w.scratch + t.position[k] * ELEMENT;
      store(z, ar - bi);
      store(z + L, ai + br);
      if (k && 2 * k != n) {
        float* c = w.scratch + t.position[n - k] * ELEMENT;
        store(c, ar + bi);
        store(c + L, br - ai);
      }
    }
    float* second = w.line + patch.cols * L;
    inverse(t, w.scratch, scale, offset, w.line, second, L, samples);
    float* to = origin + row * patch.row;
    if (pair && patch.cols == patch.row) {
      deinterleave(w.line, patch.plane, patch.channels, 2 * patch.cols, to);
    } else {
      deinterleave(w.line, patch.plane, patch.channels, patch.cols, to);
      if (pair) deinterleave(second, patch.plane, patch.channels, patch.cols, to + patch.row);
    }
  }
}

LK_INLINE int group_channels(const Task& task, int64_t group) {
  return static_cast<int>(smaller<int64_t>(L, task.channels - group * L));
}

// A tile of one axis: its samples [begin, end) and the window of samples that they depend on.
struct Tile {
  int64_t begin, end, window_begin, window_end;
  Wrapped tile() const { return Wrapped{0, static_cast<int>(end - begin)}; }
  Wrapped window() const {
    return Wrapped{static_cast<int>(begin - window_begin),
                   static_cast<int>(window_end - window_begin)};
  }
};

LK_INLINE Tile tile_of(const Axis& a, int64_t index) {
  Tile t;
  t.begin = index * a.tile;
  t.end = smaller(t.begin + a.tile, a.size);
  t.window_begin = larger<int64_t>(0, t.begin - a.radius);
  t.window_end = smaller(t.end + a.radius, a.size);
  return t;
}

LK_INLINE Patch patch_of(const Task& task, int64_t group, int64_t rows, int64_t cols) {
  return Patch{task.height * task.width, task.width, group_channels(task, group),
               static_cast<int>(rows), static_cast<int>(cols)};
}

LK_INLINE Patch weight_patch(const Task& task, int64_t group) {
  return Patch{static_cast<int64_t>(task.kernel) * task.kernel, task.kernel,
               group_channels(task, group), 2 * task.plan.y.radius + 1,
               2 * task.plan.x.radius + 1};
}

LK_INLINE int64_t weight_origin(const Task& task, int64_t group) {
  const int64_t k = task.kernel;
  return group * L * k * k + task.plan.y.crop * k + task.plan.x.crop;
}

LK_INLINE Wrapped taps(const Axis& a) { return Wrapped{a.radius, 2 * a.radius + 1}; }

void weight_spectrum(const Task& task, int64_t group, const Workspace& w, float* spectrum) {
  const FftPlan& plan = task.plan;
  const ptrdiff_t stride = static_cast<ptrdiff_t>(plan.row_stride) * ELEMENT;
  transform_rows(plan, task.weight + weight_origin(task, group), weight_patch(task, group),
                 taps(plan.x), w, w.rows);
  for (int k = 0; k < plan.columns; ++k) {
    const float* column = w.rows + k * ELEMENT;
    forward(*plan.y.transform, column, column + L, stride, taps(plan.y),
            spectrum + static_cast<ptrdiff_t>(k) * plan.y.transform->n * ELEMENT);
  }
}

void fft_spectrum(const Task& task, int64_t group, float* memory) {
  Workspace w;
  lay_out(task, memory, &w);
  weight_spectrum(task, group, w, task.spectrum_out + group * spectrum_floats(task));
}

// The factor that two transforms of real rows and an unnormalized inverse leave behind.
LK_INLINE V normalization(const FftPlan& plan) {
  return broadcast(
      static_cast<float>(0.25 / plan.y.transform->n / plan.x.transform->n));
}

// Images [first, last) of a group.
void fft_forward(const Task& task, int64_t group, int64_t first, int64_t last, float* memory) {
  const FftPlan& plan = task.plan;
  const Transform& t = *plan.y.transform;
  const ptrdiff_t stride = static_cast<ptrdiff_t>(plan.row_stride) * ELEMENT;
  const int64_t area = task.height * task.width;
  const V one = broadcast(1.0f);
  Workspace w;
  lay_out(task, memory, &w);
  const float* spectrum = task.spectrum + group * spectrum_floats(task);
  if (!task.spectrum) {
    weight_spectrum(task, group, w, w.weight);
    spectrum = w.weight;
  }
  const V offset = task.bias ? load_lanes(task.bias + group * L, group_channels(task, group))
                             : zero();
  for (int64_t image = first; image < last; ++image) {
    const int64_t plane = (image * task.channels + group * L) * area;
    for (int64_t ty = 0; ty < plan.y.tiles; ++ty)
      for (int64_t tx = 0; tx < plan.x.tiles; ++tx) {
        const Tile y = tile_of(plan.y, ty), x = tile_of(plan.x, tx);
        transform_rows(plan, task.x + plane + y.window_begin * task.width + x.window_begin,
                       patch_of(task, group, y.window().count, x.window().count), x.window(), w,
                       w.rows);
        for (int k = 0; k < plan.columns; ++k) {
          float* column = w.rows + k * ELEMENT;
          begin_forward(t, column, column + L, stride, y.window(), w.scratch);
          kPasses[t.radix[t.passes - 1]].product(
              w.scratch, spectrum + static_cast<ptrdiff_t>(k) * t.n * ELEMENT, t.n);
          finish_inverse(t, w.scratch, one, zero(), column, column + L, stride, y.tile());
        }
        restore_rows(plan, w.rows, x.tile(), normalization(plan), offset, w,
                     task.y + plane + y.begin * task.width + x.begin,
                     patch_of(task, group, y.tile().count, x.tile().count));
      }
  }
}

// Both gradients of a group, or one of them.  The output's gradient is transformed once for both.
void fft_gradients(const Task& task, int64_t group, float* memory) {
  const FftPlan& plan = task.plan;
  const Transform& t = *plan.y.transform;
  const ptrdiff_t stride = static_cast<ptrdiff_t>(plan.row_stride) * ELEMENT;
  const int64_t area = task.height * task.width;
  const V one = broadcast(1.0f);
  Workspace w;
  lay_out(task, memory, &w);
  if (task.dx) weight_spectrum(task, group, w, w.weight);
  bool empty = true;  // nothing in w.sum yet
  for (int64_t image = 0; image < task.batch; ++image) {
    const int64_t plane = (image * task.channels + group * L) * area;
    for (int64_t ty = 0; ty < plan.y.tiles; ++ty)
      for (int64_t tx = 0; tx < plan.x.tiles; ++tx) {
        const Tile y = tile_of(plan.y, ty), x = tile_of(plan.x, tx);
        const Patch window = patch_of(task, group, y.window().count, x.window().count);
        const Patch tile = patch_of(task, group, y.tile().count, x.tile().count);
        const int64_t corner = plane + y.begin * task.width + x.begin;
        transform_rows(plan, task.dy + plane + y.window_begin * task.width + x.window_begin,
                       window, x.window(), w, w.rows);
        if (task.dweight) transform_rows(plan, task.x + corner, tile, x.tile(), w, w.rows2);
        for (int k = 0; k < plan.columns; ++k) {
          float* column = w.rows + k * ELEMENT;
          forward(t, column, column + L, stride, y.window(), w.scratch);
          if (task.dweight) {
            const float* column2 = w.rows2 + k * ELEMENT;
            forward(t, column2, column2 + L, stride, y.tile(), w.scratch2);
            float* sum = w.sum + static_cast<ptrdiff_t>(k) * t.n * ELEMENT;
            for (int e = 0; e < t.n * ELEMENT; e += ELEMENT) {
              const V gr = load(w.scratch + e), gi = load(w.scratch + e + L);
              const V xr = load(w.scratch2 + e), xi = load(w.scratch2 + e + L);
              const V sr = empty ? zero() : load(sum + e), si = empty ? zero() : load(sum + e + L);
              store(sum + e, fma(xi, gi, fma(xr, gr, sr)));
              store(sum + e + L, fnma(xr, gi, fma(xi, gr, si)));
            }
          }
          if (task.dx) {
            const float* weight = w.weight + static_cast<ptrdiff_t>(k) * t.n * ELEMENT;
            for (int e = 0; e < t.n * ELEMENT; e += ELEMENT) {
              const V gr = load(w.scratch + e), gi = load(w.scratch + e + L);
              const V wr = load(weight + e), wi = load(weight + e + L);
              store(w.scratch + e, fnma(gi, wi, gr * wr));
              store(w.scratch + e + L, fma(gr, wi, gi * wr));
            }
            inverse(t, w.scratch, one, zero(), column, column + L, stride, y.tile());
          }
        }
        empty = false;
        if (task.dx)
          restore_rows(plan, w.rows, x.tile(), normalization(plan), zero(), w, task.dx + corner,
                       tile);
      }
  }
  if (!task.dweight) return;
  const Patch patch = weight_patch(task, group);
  if (plan.y.crop || plan.x.crop) {
    // Taps that never meet the map.
    const int64_t taps_of_group = patch.plane * patch.channels;
    float* begin = task.dweight + group * L * patch.plane;
    for (int64_t i = 0; i < taps_of_group; ++i) begin[i] = 0.0f;
  }
  for (int k = 0; k < plan.columns; ++k) {
    float* column = w.rows + k * ELEMENT;
    inverse(t, w.sum + static_cast<ptrdiff_t>(k) * t.n * ELEMENT, one, zero(), column, column + L,
            stride, taps(plan.y));
  }
  restore_rows(plan, w.rows, taps(plan.x), normalization(plan), zero(), w,
               task.dweight + weight_origin(task, group), patch);
}
