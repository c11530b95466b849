"""The ONNX graph of a folded RepLKNet, built from its layers one by one.

A folded network is seven operators: Conv, Relu, Gelu, Add and, at the end, GlobalAveragePool,
Flatten and Gemm. Building them takes a page and works with every Paddle, where a converter of
Paddle's programs follows Paddle's releases.
"""

import numpy as np
from paddle import nn

from replknet_paddle.model import ConvFFN, ConvNorm, RepLKNet
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.packages import import_extra

OPSET = 20  # the first with Gelu
IR_VERSION = 10  # of onnx 1.16; later ones say nothing more here, and older readers refuse them
INPUT, OUTPUT = "images", "logits"


class GraphBuilder:
    """Nodes and weights of a graph in the making; each method adds what gives its result's name.

    Weights are stored in the half precision of the onnx name `half_weights`, if there is one; a
    Cast brings them back to float32, in which everything is computed.
    """

    def __init__(self, half_weights: str | None = None):
        self.onnx = import_extra("onnx", "deploy")
        self.half_weights = half_weights
        self.nodes = []
        self.initializers = []

    def node(self, op: str, name: str, inputs: list[str], *, output=None, **attributes) -> str:
        output = output or f"{name}:out"
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(self.onnx.numpy_helper.from_array(value, name))
        return name

    def weight(self, name: str, value: np.ndarray) -> str:
        value = np.ascontiguousarray(value, dtype=np.float32)
        onnx = self.onnx
        if self.half_weights is None or value.ndim == 1:  # biases are small, and add up
            self.initializers.append(onnx.numpy_helper.from_array(value, name))
            return name
        dtype = onnx.TensorProto.DataType.Value(self.half_weights)
        with np.errstate(over="ignore"):
            half = value.astype(onnx.helper.tensor_dtype_to_np_dtype(dtype))
        if not np.isfinite(half.astype(np.float32)).all():
            raise InputError(f"{name} is too large for {self.half_weights}; allowed: fp32, bf16")
        self.initializers.append(
            onnx.helper.make_tensor(f"{name}:half", dtype, value.shape, half.tobytes(), raw=True)
        )
        return self.node("Cast", name, [f"{name}:half"], to=onnx.TensorProto.FLOAT)

    def conv(self, name: str, layer: nn.Conv2D, x: str) -> str:
        return self.node(
            "Conv",
            name,
            [
                x,
                self.weight(f"{name}.weight", layer.weight.numpy()),
                self.weight(f"{name}.bias", layer.bias.numpy()),
            ],
            kernel_shape=list(layer._kernel_size),
            strides=list(layer._stride),
            pads=[layer._padding] * 4,
            group=layer._groups,
        )

    def conv_norm(self, name: str, layer: ConvNorm, x: str) -> str:
        x = self.conv(f"{name}.conv", layer.conv, x)
        return self.node("Relu", f"{name}.relu", [x]) if layer.relu else x

    def block(self, name: str, block, x: str) -> str:
        y = self.conv_norm(f"{name}.pw_conv_1", block.pw_conv_1, x)
        if isinstance(block, ConvFFN):
            y = self.node("Gelu", f"{name}.gelu", [y])
        else:
            large = f"{name}.large_kernel.large_kernel_reparam"
            y = self.conv(large, block.large_kernel.large_kernel_reparam, y)
            y = self.node("Relu", f"{name}.relu", [y])
        y = self.conv_norm(f"{name}.pw_conv_2", block.pw_conv_2, y)
        return self.node("Add", f"{name}.add", [x, y])

    def model(self, *, in_channels: int, output_shape: list):
        """Return the `onnx.ModelProto`: images (batch, in_channels, height, width) -> logits."""
        helper, types = self.onnx.helper, self.onnx.TensorProto
        input_shape = ["batch", in_channels, "height", "width"]
        return helper.make_model(
            helper.make_graph(
                self.nodes,
                "RepLKNet",
                [helper.make_tensor_value_info(INPUT, types.FLOAT, input_shape)],
                [helper.make_tensor_value_info(OUTPUT, types.FLOAT, output_shape)],
                self.initializers,
            ),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="RepLKNet in PaddlePaddle",
        )


def onnx_model(model: RepLKNet, *, half_weights: str | None = None):
    """Return the `onnx.ModelProto` of a folded classifier: images (N, 3, H, W) of any number and
    size -> logits (N, num_classes), float32."""
    if not all(isinstance(layer, nn.Identity) for layer in norms(model)):
        raise ValueError("a norm is left; give a classifier that deploy.fold.folded returned")
    graph = GraphBuilder(half_weights)
    x = backbone_maps(graph, model)[-1]
    x = graph.node("GlobalAveragePool", "pool", [x])
    x = graph.node("Flatten", "flatten", [x], axis=1)
    head = [
        graph.weight("head.weight", model.head.weight.numpy()),
        graph.weight("head.bias", model.head.bias.numpy()),
    ]
    graph.node("Gemm", "head", [x, *head], output=OUTPUT)
    return graph.model(
        in_channels=model.stem[0].conv._in_channels,
        output_shape=["batch", model.head.weight.shape[1]],
    )


def backbone_maps(graph: GraphBuilder, model: RepLKNet, prefix: str = "") -> list[str]:
    """Add the stem and the stages of a folded network; return the names of the stages' maps."""
    x, maps = INPUT, []
    for i, layer in enumerate(model.stem):
        x = graph.conv_norm(f"{prefix}stem.{i}", layer, x)
    for i, stage in enumerate(model.stages):
        if i > 0:
            for j, layer in enumerate(model.transitions[i - 1]):
                x = graph.conv_norm(f"{prefix}transitions.{i - 1}.{j}", layer, x)
        for j, block in enumerate(stage.blocks):
            x = graph.block(f"{prefix}stages.{i}.blocks.{j}", block, x)
        maps.append(x)
    return maps


def norms(model: RepLKNet):
    """Yield what stands in the places of the norms on a classifier's path."""
    for layer in model.sublayers():
        for name in ("norm", "pre_large_kernel_bn", "pre_ffn_bn"):
            if name in layer._sub_layers and not hasattr(layer, "blocks"):
                yield layer._sub_layers[name]
    yield model.norm
