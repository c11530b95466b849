// Operations on 8-bit RGB images whose results equal Pillow's bit for bit, several times as fast.
//
// Pillow computes these a pixel and a tap at a time. Here the channels of one or two pixels go
// through vector registers together; every sum keeps its terms, their order and their precision.
// Built and called by pixels.py, with -ffp-contract=off: a fused multiply-add rounds differently.
//
// "RGB" is 3 bytes a pixel, "RGBX" 4, the last one unused; rows follow each other without a gap.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

namespace {

using Bytes4 = uint8_t __attribute__((vector_size(4)));
using Bytes8 = uint8_t __attribute__((vector_size(8)));
using Ints4 = int32_t __attribute__((vector_size(16)));
using Ints8 = int32_t __attribute__((vector_size(32)));
using Doubles4 = double __attribute__((vector_size(32)));

// Weights are integers in units of 2^-22: 8 bits of pixel and 2 of overshoot fill up 32.
constexpr int WEIGHT_BITS = 22;

// ---- between bytes in memory and wider numbers in registers: compilers make poor work of these

#ifdef __AVX2__
INLINE Ints4 load4(const uint8_t* from) {
    int32_t bytes;
    std::memcpy(&bytes, from, 4);
    return (Ints4)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes));
}

INLINE Ints8 load8(const uint8_t* from) {
    return (Ints8)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
}

INLINE Doubles4 to_doubles(Ints4 ints) { return (Doubles4)_mm256_cvtepi32_pd((__m128i)ints); }

INLINE Ints4 to_ints(Doubles4 doubles) { return (Ints4)_mm256_cvttpd_epi32((__m256d)doubles); }

// Values beyond [0, 255] become its ends.
INLINE void store4(Ints4 ints, uint8_t* to) {
    const __m128i words = _mm_packs_epi32((__m128i)ints, (__m128i)ints);
    const int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
    std::memcpy(to, &bytes, 4);
}

INLINE void store8(Ints8 ints, uint8_t* to) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)ints),
                                          _mm256_extracti128_si256((__m256i)ints, 1));
    _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(words, words));
}
#else
INLINE Ints4 load4(const uint8_t* from) {
    Bytes4 bytes;
    std::memcpy(&bytes, from, 4);
    return __builtin_convertvector(bytes, Ints4);
}

INLINE Ints8 load8(const uint8_t* from) {
    Bytes8 bytes;
    std::memcpy(&bytes, from, 8);
    return __builtin_convertvector(bytes, Ints8);
}

INLINE Doubles4 to_doubles(Ints4 ints) { return __builtin_convertvector(ints, Doubles4); }

INLINE Ints4 to_ints(Doubles4 doubles) { return __builtin_convertvector(doubles, Ints4); }

template <typename Ints>
INLINE Ints clamp(Ints ints) {
    ints = ints < 0 ? Ints{} : ints;
    return ints > 255 ? Ints{} + 255 : ints;
}

INLINE void store4(Ints4 ints, uint8_t* to) {
    const Bytes4 bytes = __builtin_convertvector(clamp(ints), Bytes4);
    std::memcpy(to, &bytes, 4);
}

INLINE void store8(Ints8 ints, uint8_t* to) {
    const Bytes8 bytes = __builtin_convertvector(clamp(ints), Bytes8);
    std::memcpy(to, &bytes, 8);
}
#endif

// ---- resizing: antialiased bicubic along one axis and then the other, 8 bits in between

double cubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

// What each output position of an axis is made of: the input positions from its `first` on, by
// `pairs` pairs of weights. Every weight stands there four times, once for each channel. All
// positions have equally many, zeros at their ends, since a loop that ends now sooner and now later
// costs more than it saves; so some of the input positions may lie past the end.
struct Taps {
    int pairs = 0;
    std::vector<int> first;
    std::vector<int> count;  // up to the last weight that is not padding
    std::vector<Ints4> weights;

    const Ints4* of(size_t position) const { return weights.data() + 2 * pairs * position; }
};

// The taps of output positions [begin, end) of an axis of which [low, high) becomes `out` pixels.
Taps make_taps(int in, double low, double high, int out, int begin, int end) {
    const double scale = (high - low) / out;
    const double stretch = std::max(scale, 1.0);
    const double support = 2.0 * stretch, shrink = 1.0 / stretch;
    Taps taps;
    std::vector<double> centers;
    for (int position = begin; position < end; ++position) {
        const double center = low + (position + 0.5) * scale;
        const int first = std::max(static_cast<int>(center - support + 0.5), 0);
        const int last = std::min(static_cast<int>(center + support + 0.5), in);
        centers.push_back(center);
        taps.first.push_back(first);
        taps.count.push_back(last - first);
        taps.pairs = std::max(taps.pairs, (last - first + 1) / 2);
    }
    taps.weights.assign(2 * taps.pairs * centers.size(), Ints4{});
    std::vector<double> shares(2 * taps.pairs);
    for (size_t position = 0; position < centers.size(); ++position) {
        double sum = 0.0;
        for (int i = 0; i < taps.count[position]; ++i) {
            shares[i] = cubic((i + taps.first[position] - centers[position] + 0.5) * shrink);
            sum += shares[i];
        }
        Ints4* weights = taps.weights.data() + 2 * taps.pairs * position;
        for (int i = 0; i < taps.count[position]; ++i) {
            const double share = sum != 0.0 ? shares[i] / sum : shares[i];
            const double scaled = share * (1 << WEIGHT_BITS);
            weights[i] += static_cast<int32_t>(share < 0 ? scaled - 0.5 : scaled + 0.5);
        }
    }
    return taps;
}

template <int Pairs>
INLINE void resize_row(const uint8_t* in, const Taps& columns, uint8_t* out) {
    const int pairs = Pairs ? Pairs : columns.pairs;
    const Ints4* weights = columns.weights.data();
    for (int first : columns.first) {
        Ints8 sum{};  // of the even taps, and of the odd ones
        const uint8_t* pixel = in + 4 * static_cast<size_t>(first);
        for (int i = 0; i < pairs; ++i, pixel += 8, weights += 2) {
            Ints8 two_weights;
            std::memcpy(&two_weights, weights, sizeof(two_weights));
            sum += load8(pixel) * two_weights;
        }
        Ints4 halves[2];
        std::memcpy(halves, &sum, sizeof(sum));
        store4((halves[0] + halves[1] + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS, out);
        out += 4;
    }
}

// One row of RGBX pixels; `in` must be readable for 2 * pairs pixels past its end.
INLINE void resize_row(const uint8_t* in, const Taps& columns, uint8_t* out) {
    switch (columns.pairs) {  // loops of known length for reductions to a half and less
        case 2: return resize_row<2>(in, columns, out);
        case 3: return resize_row<3>(in, columns, out);
        case 4: return resize_row<4>(in, columns, out);
        case 5: return resize_row<5>(in, columns, out);
        default: return resize_row<0>(in, columns, out);
    }
}

// The row of `width` RGBX pixels that `count` rows make, which are `stride` bytes apart.
INLINE void mix_rows(const uint8_t* in, size_t stride, int width, const Ints4* weights, int count,
                     uint8_t* out) {
    const size_t size = 4 * static_cast<size_t>(width);
    size_t x = 0;
    for (; x + 8 <= size; x += 8) {
        Ints8 sum = Ints8{} + (1 << (WEIGHT_BITS - 1));
        for (int i = 0; i < count; ++i) {
            sum += load8(in + stride * i + x) * weights[i][0];
        }
        store8(sum >> WEIGHT_BITS, out + x);
    }
    if (x < size) {
        Ints4 sum = Ints4{} + (1 << (WEIGHT_BITS - 1));
        for (int i = 0; i < count; ++i) sum += load4(in + stride * i + x) * weights[i];
        store4(sum >> WEIGHT_BITS, out + x);
    }
}

// RGBX to RGB, in reverse order if `flip`. Each store but the last spills into the next pixel.
INLINE void pack_row(const uint8_t* in, int width, bool flip, uint8_t* out) {
    for (int x = 0; x < width; ++x) {
        const uint8_t* pixel = in + 4 * static_cast<size_t>(flip ? width - 1 - x : x);
        std::memcpy(out + 3 * static_cast<size_t>(x), pixel, x + 1 < width ? 4 : 3);
    }
}

// ---- affine maps, bicubic

// The cubic through four neighbours at `t` past the second; the order of terms is Pillow's.
INLINE Doubles4 interpolate(Doubles4 a, Doubles4 b, Doubles4 c, Doubles4 d, double t) {
    const Doubles4 slope = -a + c;
    const Doubles4 bend = 2.0 * (a - b) + c - d;
    const Doubles4 twist = -a + b - c + d;
    return b + t * (slope + t * (bend + t * twist));
}

// Positions on an axis: each lies `t` past the pixel `second` of the four around it.
struct Places {
    std::vector<int> second;  // OUTSIDE, if off the axis
    std::vector<double> t;
    static constexpr int OUTSIDE = -2;

    explicit Places(int count) : second(count), t(count) {}

    // The positions of a row of output pixels: slope * (x + 0.5) + first + last, in this order.
    INLINE_MEMBER void fill(double slope, double first, double last, int length) {
        for (size_t x = 0; x < t.size(); ++x) {
            const double at = slope * (static_cast<int>(x) + 0.5) + first + last;
            const double below = std::floor(at - 0.5);
            t[x] = at - 0.5 - below;
            second[x] = (at >= 0.0) & (at < length) ? static_cast<int>(below) : OUTSIDE;
        }
    }
};

// Offsets of the four pixels around a place; those off the axis are the nearest on it.
struct Around {
    size_t at[4];

    INLINE_MEMBER Around(int second, int length, size_t stride) {
        if (second >= 1 && second + 2 < length) {
            for (int i = 0; i < 4; ++i) at[i] = stride * (second - 1) + stride * i;
        } else {
            for (int i = 0; i < 4; ++i) {
                at[i] = stride * std::min(std::max(second - 1 + i, 0), length - 1);
            }
        }
    }
};

// `interpolate` for a row of RGBX pixels: sums of bytes are exact in any order, and integers are
// faster.
INLINE Doubles4 along_row(const uint8_t* row, const Around& columns, double t) {
    const Ints4 b = load4(row + columns.at[1]);
    if (t == 0.0) return to_doubles(b);  // exactly: the other terms vanish
    const Ints4 a = load4(row + columns.at[0]), c = load4(row + columns.at[2]);
    const Ints4 rise = b - a, twist = rise + load4(row + columns.at[3]) - c;
    return to_doubles(b) +
           t * (to_doubles(c - a) + t * (to_doubles(-rise - twist) + t * to_doubles(twist)));
}

// Memory that later calls use again: fresh memory costs more than what is done with it.
template <int Which>
uint8_t* scratch(size_t size) {
    static thread_local std::vector<uint8_t> memory;
    if (memory.size() < size) memory.resize(size);
    return memory.data();
}

}  // namespace

extern "C" {

// Resize the part `box` (left, top, right, bottom) of RGBX (height, width), whose rows are `stride`
// bytes apart, to `out_height` x `out_width` pixels, and write, as RGB, those of them within `keep`
// (likewise), mirrored if `flip`.
void resize(const uint8_t* in, int width, int height, int64_t stride, const double* box,
            int out_width, int out_height, const int32_t* keep, int vertical_first, int flip,
            uint8_t* out) {
    const Taps columns = make_taps(width, box[0], box[2], out_width, keep[0], keep[2]);
    const Taps rows = make_taps(height, box[1], box[3], out_height, keep[1], keep[3]);
    const int kept_width = keep[2] - keep[0], kept_height = keep[3] - keep[1];
    const size_t size = 4 * static_cast<size_t>(width);
    const size_t kept_stride = 4 * static_cast<size_t>(kept_width);
    uint8_t* row = scratch<0>(size + 8 * static_cast<size_t>(columns.pairs));
    uint8_t* result = scratch<1>(kept_stride);
    const int first = rows.first.front(), last = rows.first.back() + rows.count.back();
    uint8_t* narrow = vertical_first ? nullptr : scratch<2>(kept_stride * (last - first));
    for (int y = first; !vertical_first && y < last; ++y) {
        std::memcpy(row, in + stride * y, size);
        resize_row(row, columns, narrow + kept_stride * (y - first));
    }
    for (int y = 0; y < kept_height; ++y) {
        if (vertical_first) {
            mix_rows(in + stride * rows.first[y], stride, width, rows.of(y), rows.count[y], row);
            resize_row(row, columns, result);
        } else {
            mix_rows(narrow + kept_stride * (rows.first[y] - first), kept_stride, kept_width,
                     rows.of(y), rows.count[y], result);
        }
        pack_row(result, kept_width, flip, out + 3 * static_cast<size_t>(kept_width) * y);
    }
}

// RGB (height, width) to the same size: the output position (x, y) takes the colour at
// (m0 x + m1 y + m2, m3 x + m4 y + m5) of the input, or `fill` outside of it.
void affine(const uint8_t* in, int width, int height, const double* m,
                     const uint8_t* fill, uint8_t* out) {
    const size_t stride = 4 * static_cast<size_t>(width);
    uint8_t* rgbx = scratch<0>(stride * height);
    for (size_t i = 0; i < static_cast<size_t>(width) * height; ++i) {
        std::memcpy(rgbx + 4 * i, in + 3 * i, 3);
    }
    Places columns(width), rows(width);
    for (int y = 0; y < height; ++y) {
        columns.fill(m[0], m[1] * (y + 0.5), m[2], width);
        rows.fill(m[3], m[4] * (y + 0.5), m[5], height);
        for (int x = 0; x < width; ++x, out += 3) {
            if (columns.second[x] == Places::OUTSIDE || rows.second[x] == Places::OUTSIDE) {
                std::memcpy(out, fill, 3);
                continue;
            }
            const Around column(columns.second[x], width, 4);
            const Around row(rows.second[x], height, stride);
            const double tx = columns.t[x], ty = rows.t[x];
            Doubles4 color = along_row(rgbx + row.at[1], column, tx);
            if (ty != 0.0) {
                color = interpolate(along_row(rgbx + row.at[0], column, tx), color,
                                    along_row(rgbx + row.at[2], column, tx),
                                    along_row(rgbx + row.at[3], column, tx), ty);
            }
            uint8_t bytes[4];
            store4(to_ints(color), bytes);  // towards zero, as Pillow does
            std::memcpy(out, bytes, 3);
        }
    }
}

// Replace the value v of channel c by table[c][v].
void lookup(const uint8_t* in, int pixels, const uint8_t* table, uint8_t* out) {
    for (size_t i = 0; i < 3 * static_cast<size_t>(pixels); i += 3) {
        for (int channel = 0; channel < 3; ++channel) {
            out[i + channel] = table[256 * channel + in[i + channel]];
        }
    }
}

// counts[c][v]: how many pixels have the value v in channel c.
void histogram(const uint8_t* in, int pixels, int64_t* counts) {
    std::vector<uint32_t> partial(6 * 256);  // two, since equal neighbours would wait for each other
    for (int i = 0; i < pixels; ++i, in += 3) {
        uint32_t* part = partial.data() + (i & 1) * 3 * 256;
        for (int channel = 0; channel < 3; ++channel) ++part[256 * channel + in[channel]];
    }
    for (int i = 0; i < 3 * 256; ++i) counts[i] = partial[i] + partial[3 * 256 + i];
}

// Each channel becomes the luminance (ITU-R 601-2, in units of 2^-16).
void grey(const uint8_t* in, int pixels, uint8_t* out) {
    for (size_t i = 0; i < 3 * static_cast<size_t>(pixels); i += 3) {
        const int sum = in[i] * 19595 + in[i + 1] * 38470 + in[i + 2] * 7471 + 0x8000;
        out[i] = out[i + 1] = out[i + 2] = static_cast<uint8_t>(sum >> 16);
    }
}

// from + factor * (to - from), cut to [0, 255] and then towards zero.
void blend(const uint8_t* from, const uint8_t* to, int64_t bytes, float factor,
                    uint8_t* out) {
    for (int64_t i = 0; i < bytes; ++i) {
        float value = from[i] + factor * (to[i] - from[i]);
        value = value > 0.0f ? value : 0.0f;
        out[i] = static_cast<uint8_t>(static_cast<int>(value < 255.0f ? value : 255.0f));
    }
}

// 3x3 average in which the centre counts five times; the border stays as it is. The sum over 13 is
// never halfway between integers, so integer rounding equals Pillow's in floating point.
void smooth(const uint8_t* in, int width, int height, uint8_t* out) {
    const size_t stride = 3 * static_cast<size_t>(width);
    std::memcpy(out, in, stride * height);
    for (int y = 1; y + 1 < height; ++y) {
        const uint8_t* here = in + y * stride;
        const uint8_t *above = here - stride, *below = here + stride;
        uint8_t* to = out + y * stride;
        for (size_t i = 3; i + 3 < stride; ++i) {
            const int32_t sum = above[i - 3] + above[i] + above[i + 3] +
                                here[i - 3] + 5 * here[i] + here[i + 3] +
                                below[i - 3] + below[i] + below[i + 3];
            to[i] = static_cast<uint8_t>((2 * sum + 13) / 26);
        }
    }
}

}  // extern "C"
