// The Paddle operators over large_kernel.h and pointwise.h: types, shapes and memory; no arithmetic
// of their own.
//
// The depthwise one comes with and without a bias, because optional inputs of custom operators
// differ between Paddle's versions. The gradient operators always give all gradients.
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "large_kernel.h"
#include "paddle/phi/api/ext/op_meta_info.h"
#include "paddle/phi/api/include/api.h"
#include "pointwise.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

// Of this process; Python sets it when it loads the library.
std::atomic<int> g_threads{1};

std::string text(const Shape& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    out += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return out + ")";
}

// A program may meet its shapes only now, so that they are checked here once more.
lk_shape checked_shape(const Tensor& x, const Shape& weight) {
  const Shape map = x.shape();
  PD_CHECK(x.place().GetType() == phi::AllocationType::CPU,
           "the large-kernel depthwise convolution computes on CPU alone");
  PD_CHECK(map.size() == 4 && map[1] > 0 && map[2] > 0 && map[3] > 0 && weight.size() == 4 &&
               weight[0] == map[1] && weight[1] == 1 && weight[2] == weight[3] &&
               weight[2] % 2 == 1 && weight[2] >= 3 && weight[2] <= 63,
           "x must be (N, C, H, W) and weight (C, 1, K, K) with K odd, from 3 to 63; got ",
           text(map), " and ", text(weight));
  lk_shape shape;
  shape.batch = map[0];
  shape.channels = map[1];
  shape.height = map[2];
  shape.width = map[3];
  shape.kernel = static_cast<int>(weight[2]);
  return shape;
}

void check(int status) {
  PD_CHECK(status != LK_NO_MEMORY, "no memory left for a large-kernel depthwise convolution");
  PD_CHECK(status == LK_OK, "the kernels refuse these arguments, status ", status);
}

Tensor as_type(const Tensor& t, DataType type) {
  return t.dtype() == type ? t : paddle::experimental::cast(t, type);
}

Tensor float32(const Tensor& t) { return as_type(t, DataType::FLOAT32); }

Tensor allocate(const Shape& shape) {
  return paddle::experimental::empty(shape, DataType::FLOAT32, phi::CPUPlace());
}

Tensor forward(const Tensor& x, const Tensor& weight, const Tensor* bias, int algorithm) {
  const lk_shape shape = checked_shape(x, weight.shape());
  const Tensor x32 = float32(x), weight32 = float32(weight);
  const Tensor bias32 = bias ? float32(*bias) : Tensor();
  PD_CHECK(!bias || bias->numel() == shape.channels, "bias has ", bias ? bias->numel() : 0,
           " values for ", shape.channels, " channels");
  Tensor y = allocate(x.shape());
  check(lk_forward(&shape, x32.data<float>(), weight32.data<float>(),
                   bias ? bias32.data<float>() : nullptr, y.data<float>(), algorithm,
                   g_threads));
  return as_type(y, x.dtype());
}

std::vector<Tensor> gradients(const Tensor& x, const Tensor& weight, const Tensor* bias,
                              const Tensor& dy, int algorithm) {
  const lk_shape shape = checked_shape(x, weight.shape());
  PD_CHECK(dy.shape() == x.shape(), "the gradient is ", text(dy.shape()), ", the map ",
           text(x.shape()));
  const Tensor x32 = float32(x), weight32 = float32(weight), dy32 = float32(dy);
  Tensor dx = allocate(x.shape()), dweight = allocate(weight.shape());
  check(lk_gradients(&shape, x32.data<float>(), weight32.data<float>(), dy32.data<float>(),
                     dx.data<float>(), dweight.data<float>(), algorithm, g_threads));
  std::vector<Tensor> out = {as_type(dx, x.dtype()), as_type(dweight, weight.dtype())};
  if (bias) {
    const Tensor sums = paddle::experimental::sum(dy32, {0, 2, 3}, DataType::FLOAT64, false);
    out.push_back(as_type(sums, bias->dtype()));
  }
  return out;
}

std::vector<Tensor> Forward(const Tensor& x, const Tensor& weight, int algorithm) {
  return {forward(x, weight, nullptr, algorithm)};
}

std::vector<Tensor> ForwardBias(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                int algorithm) {
  return {forward(x, weight, &bias, algorithm)};
}

std::vector<Tensor> Gradients(const Tensor& x, const Tensor& weight, const Tensor& dy,
                              int algorithm) {
  return gradients(x, weight, nullptr, dy, algorithm);
}

std::vector<Tensor> GradientsBias(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                  const Tensor& dy, int algorithm) {
  return gradients(x, weight, &bias, dy, algorithm);
}

pw_shape checked_pointwise(const Tensor& x, const Shape& weight) {
  const Shape map = x.shape();
  PD_CHECK(x.place().GetType() == phi::AllocationType::CPU,
           "the pointwise convolution computes on CPU alone");
  PD_CHECK(map.size() == 4 && map[1] > 0 && map[2] > 0 && map[3] > 0 && weight.size() == 4 &&
               weight[0] > 0 && weight[1] == map[1] && weight[2] == 1 && weight[3] == 1,
           "x must be (N, C, H, W) and weight (C', C, 1, 1); got ", text(map), " and ",
           text(weight));
  return {map[0], map[1], weight[0], map[2] * map[3]};
}

std::vector<Tensor> Pointwise(const Tensor& x, const Tensor& weight) {
  const pw_shape shape = checked_pointwise(x, weight.shape());
  const Tensor x32 = float32(x), weight32 = float32(weight);
  Shape out = x.shape();
  out[1] = shape.out_channels;
  Tensor y = allocate(out);
  check(pw_forward(&shape, x32.data<float>(), weight32.data<float>(), y.data<float>(),
                   g_threads));
  return {as_type(y, x.dtype())};
}

std::vector<Tensor> PointwiseGradients(const Tensor& x, const Tensor& weight, const Tensor& dy) {
  const pw_shape shape = checked_pointwise(x, weight.shape());
  const Tensor x32 = float32(x), weight32 = float32(weight), dy32 = float32(dy);
  PD_CHECK(dy.numel() == shape.batch * shape.out_channels * shape.pixels, "the gradient is ",
           text(dy.shape()), " for a map ", text(x.shape()), " and a weight ",
           text(weight.shape()));
  Tensor dx = allocate(x.shape()), dweight = allocate(weight.shape());
  check(pw_gradients(&shape, x32.data<float>(), weight32.data<float>(), dy32.data<float>(),
                     dx.data<float>(), dweight.data<float>(), g_threads));
  return {as_type(dx, x.dtype()), as_type(dweight, weight.dtype())};
}

std::vector<Shape> PointwiseShape(const Shape& x, const Shape& weight) {
  return {{x[0], weight[0], x[2], x[3]}};
}

std::vector<Shape> MapShape(const Shape& x, const Shape&) { return {x}; }
std::vector<Shape> MapShapeBias(const Shape& x, const Shape&, const Shape&) { return {x}; }
std::vector<DataType> MapType(const DataType& x, const DataType&) { return {x}; }
std::vector<DataType> MapTypeBias(const DataType& x, const DataType&, const DataType&) {
  return {x};
}

}  // namespace

extern "C" LK_API void lk_op_set_threads(int threads) { g_threads = threads; }
extern "C" LK_API int lk_op_threads() { return g_threads; }

PD_BUILD_OP(large_kernel_depthwise_conv2d)
    .Inputs({"X", "Weight"})
    .Outputs({"Out"})
    .Attrs({"algorithm: int"})
    .SetKernelFn(PD_KERNEL(Forward))
    .SetInferShapeFn(PD_INFER_SHAPE(MapShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(MapType));

PD_BUILD_GRAD_OP(large_kernel_depthwise_conv2d)
    .Inputs({"X", "Weight", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Weight")})
    .Attrs({"algorithm: int"})
    .SetKernelFn(PD_KERNEL(Gradients));

PD_BUILD_OP(large_kernel_depthwise_conv2d_bias)
    .Inputs({"X", "Weight", "Bias"})
    .Outputs({"Out"})
    .Attrs({"algorithm: int"})
    .SetKernelFn(PD_KERNEL(ForwardBias))
    .SetInferShapeFn(PD_INFER_SHAPE(MapShapeBias))
    .SetInferDtypeFn(PD_INFER_DTYPE(MapTypeBias));

PD_BUILD_GRAD_OP(large_kernel_depthwise_conv2d_bias)
    .Inputs({"X", "Weight", "Bias", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Weight"), paddle::Grad("Bias")})
    .Attrs({"algorithm: int"})
    .SetKernelFn(PD_KERNEL(GradientsBias));

PD_BUILD_OP(pointwise_conv2d)
    .Inputs({"X", "Weight"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(Pointwise))
    .SetInferShapeFn(PD_INFER_SHAPE(PointwiseShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(MapType));

PD_BUILD_GRAD_OP(pointwise_conv2d)
    .Inputs({"X", "Weight", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Weight")})
    .SetKernelFn(PD_KERNEL(PointwiseGradients));
