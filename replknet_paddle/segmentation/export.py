"""UPerNet for inference: folded, without its auxiliary head, as a Paddle layer and an ONNX graph.

Nothing is imported from upernet.py, which asks for this form itself.

Both take images of any size. ONNX has no pooling over a grid of a given number of cells, so the
averages of the pooling pyramid are products with matrices that the graph computes from the size of
the map. In the Paddle form the resizing is such products, too: with oneDNN, Paddle Inference gives
raises NotImplementedError for bilinear interpolation (3.3.1).
"""

from functools import partial

import numpy as np
import paddle
from paddle import nn

from replknet_paddle.deploy.export import ExportForm
from replknet_paddle.deploy.fold import folded
from replknet_paddle.deploy.onnx_graph import INPUT, OUTPUT, GraphBuilder, backbone_maps


def export_form(model: nn.Layer) -> ExportForm:
    """Return the form of a `UPerNet`, which imports this module; `model` stays as it is."""
    model = folded(model)
    del model.auxiliary_head
    onnx = partial(onnx_model, model)
    head = model.decode_head
    for cells, module in zip(head.pool_scales, head.psp_modules):
        module[0] = GridPooling(cells)
    head.interpolate = resize_by_products
    return ExportForm(model, onnx)


def resize_by_products(
    x: paddle.Tensor, size: paddle.Tensor, *, align_corners: bool
) -> paddle.Tensor:
    """`upernet.resize` as products with matrices: (N, C, H, W) -> (N, C, *size)."""
    old = paddle.shape(x)[2:].astype("float32")
    new = size.astype("float32")
    rows = interpolation_weights(old[0], new[0], align_corners=align_corners)
    columns = interpolation_weights(old[1], new[1], align_corners=align_corners)
    return product(rows, x, columns)


def product(rows: paddle.Tensor, x: paddle.Tensor, columns: paddle.Tensor) -> paddle.Tensor:
    """rows (h, H) times each map of (N, C, H, W) times the transpose of columns (w, W).

    The products are of two matrices each: oneDNN's of more dimensions are wrong in Paddle
    Inference 3.3.1.
    """
    return times(times(x, columns).transpose([0, 1, 3, 2]), rows).transpose([0, 1, 3, 2])


def times(x: paddle.Tensor, weights: paddle.Tensor) -> paddle.Tensor:
    """(N, C, H, W) times the transpose of (w, W) -> (N, C, H, w)."""
    shape = paddle.shape(x)
    flat = paddle.matmul(x.reshape([-1, shape[3]]), weights.transpose([1, 0]))
    return flat.reshape([shape[0], x.shape[1], shape[2], -1])


def interpolation_weights(
    old: paddle.Tensor, new: paddle.Tensor, *, align_corners: bool
) -> paddle.Tensor:
    """Return the share of each of `old` pixels of a line in each of `new` ones: (new, old)."""
    place = paddle.arange(0, new, dtype="float32")
    if align_corners:
        place = place * (old - 1) / paddle.clip(new - 1, min=1.0)
    else:
        place = paddle.clip((place + 0.5) * old / new - 0.5, min=0.0)
        place = paddle.minimum(place, old - 1)
    pixel = paddle.arange(0, old, dtype="float32")
    distance = paddle.abs(place.unsqueeze(1) - pixel.unsqueeze(0))
    return paddle.clip(1 - distance, min=0.0)


class GridPooling(nn.Layer):
    """`nn.AdaptiveAvgPool2D` as products with matrices."""

    def __init__(self, cells: int):
        super().__init__()
        self.cells = cells

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """(N, C, H, W) -> (N, C, cells, cells)."""
        size = paddle.shape(x).astype("int64")
        return product(self.weights(size[2]), x, self.weights(size[3]))

    def weights(self, size: paddle.Tensor) -> paddle.Tensor:
        """Return the share of each of `size` pixels of a line in each cell: (cells, size)."""
        cell = paddle.arange(self.cells, dtype="int64").unsqueeze(1)
        start = cell * size // self.cells
        end = ((cell + 1) * size + self.cells - 1) // self.cells
        pixel = paddle.arange(0, size, dtype="int64").unsqueeze(0)
        inside = paddle.logical_and(pixel >= start, pixel < end).astype("float32")
        return inside / (end - start).astype("float32")


class HeadBuilder:
    """Adds the decode head of a folded network to a graph."""

    def __init__(self, graph: GraphBuilder, head: nn.Layer):
        self.graph = graph
        self.head = head
        mode = "align_corners" if head.align_corners else "half_pixel"
        self.resizing = {"mode": "linear", "coordinate_transformation_mode": mode}

    def size(self, name: str, x: str) -> str:
        """Add the height and width of a map, int64 (2,)."""
        return self.graph.node("Shape", name, [x], start=2, end=4)

    def resize(self, name: str, x: str, size: str, output: str | None = None) -> str:
        batch = self.graph.node("Shape", f"{name}.channels", [x], start=0, end=2)
        sizes = self.graph.node("Concat", f"{name}.sizes", [batch, size], axis=0)
        inputs = [x, "", "", sizes]
        return self.graph.node("Resize", name, inputs, output=output, **self.resizing)

    def conv(self, name: str, x: str) -> str:
        """Add the convolution of the head that has this name."""
        layer = self.head
        for part in name.split("."):
            layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
        return self.graph.conv_norm(f"decode_head.{name}", layer, x)

    def pooling_weights(self, name: str, size: str, cells: int) -> str:
        """Add what `GridPooling.weights` computes, of a size (1,)."""
        node, constant = self.graph.node, self.graph.constant
        cell = np.arange(cells, dtype=np.int64)[:, None]
        one = constant(f"{name}.cells", np.array(cells, np.int64))
        start = node("Mul", f"{name}.start", [constant(f"{name}.cell", cell), size])
        start = node("Div", f"{name}.first", [start, one])
        end = node("Mul", f"{name}.end", [constant(f"{name}.next", cell + 1), size])
        end = node("Add", f"{name}.up", [end, constant(f"{name}.round", np.array(cells - 1))])
        end = node("Div", f"{name}.last", [end, one])
        scalar = node("Squeeze", f"{name}.size", [size])
        bounds = [constant(f"{name}.{i}", np.array(i, np.int64)) for i in (0, 1)]
        row = node("Range", f"{name}.row", [bounds[0], scalar, bounds[1]])
        after = node("GreaterOrEqual", f"{name}.after", [row, start])
        before = node("Less", f"{name}.before", [row, end])
        inside = node("And", f"{name}.inside", [after, before])
        count = node("Sub", f"{name}.count", [end, start])
        float_type = self.graph.onnx.TensorProto.FLOAT
        inside = node("Cast", f"{name}.mask", [inside], to=float_type)
        count = node("Cast", f"{name}.number", [count], to=float_type)
        return node("Div", f"{name}.weights", [inside, count])

    def grid_average(self, name: str, x: str, cells: int) -> str:
        """(N, C, H, W) -> (N, C, cells, cells)."""
        node = self.graph.node
        rows = self.pooling_weights(
            f"{name}.rows", node("Shape", f"{name}.height", [x], start=2, end=3), cells
        )
        columns = self.pooling_weights(
            f"{name}.columns", node("Shape", f"{name}.width", [x], start=3, end=4), cells
        )
        columns = node("Transpose", f"{name}.turned", [columns], perm=[1, 0])
        pooled = node("MatMul", f"{name}.pooled_rows", [rows, x])
        return node("MatMul", f"{name}.pooled", [pooled, columns])

    def logits(self, maps: list[str]) -> str:
        """Add the head's logits from the four maps, at the scale of the first."""
        node = self.graph.node
        last = maps[-1]
        last_size = self.size("pyramid.size", last)
        pyramid = [last]
        for i, cells in enumerate(self.head.pool_scales):
            pooled = self.conv(f"psp_modules.{i}.1", self.grid_average(f"pool.{i}", last, cells))
            pyramid.append(self.resize(f"pyramid.{i}", pooled, last_size))
        top = self.conv("bottleneck", node("Concat", "pyramid", pyramid, axis=1))
        merged = [self.conv(f"lateral_convs.{i}", x) for i, x in enumerate(maps[:-1])] + [top]
        sizes = [self.size(f"laterals.{i}.size", x) for i, x in enumerate(merged[:-1])]
        for i in range(len(merged) - 2, -1, -1):
            upper = self.resize(f"top_down.{i}", merged[i + 1], sizes[i])
            merged[i] = node("Add", f"merged.{i}", [merged[i], upper])
        outs = [self.conv(f"fpn_convs.{i}", x) for i, x in enumerate(merged[:-1])] + [top]
        outs[1:] = [self.resize(f"outs.{i}", x, sizes[0]) for i, x in enumerate(outs[1:], 1)]
        x = self.conv("fpn_bottleneck", node("Concat", "outs", outs, axis=1))
        return self.graph.conv("decode_head.conv_seg", self.head.conv_seg, x)


def onnx_model(model: nn.Layer, *, half_weights: str | None = None):
    """Return the `onnx.ModelProto` of a form, which takes batches and images of any size."""
    graph = GraphBuilder(half_weights)
    builder = HeadBuilder(graph, model.decode_head)
    maps = backbone_maps(graph, model.backbone, "backbone.")
    for i, stage in enumerate(model.backbone.stages):
        if not isinstance(stage.norm, nn.Identity):
            maps[i] = batch_norm(graph, f"backbone.stages.{i}.norm", stage.norm, maps[i])
    logits = builder.logits(maps)
    builder.resize("logits.full", logits, builder.size("images.size", INPUT), OUTPUT)
    return graph.model(
        in_channels=model.backbone.stem[0].conv._in_channels,
        output_shape=["batch", model.decode_head.conv_seg.weight.shape[0], "height", "width"],
    )


def batch_norm(graph: GraphBuilder, name: str, norm: nn.Layer, x: str) -> str:
    """Add the norm of a stage's map, which no convolution can take over."""
    tensors = {"weight": norm.weight, "bias": norm.bias, "mean": norm._mean, "var": norm._variance}
    inputs = [graph.constant(f"{name}.{key}", value.numpy()) for key, value in tensors.items()]
    return graph.node("BatchNormalization", name, [x, *inputs], epsilon=norm._epsilon)
