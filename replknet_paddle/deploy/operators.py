"""What the model file of an export may hold, which is read before a library opens it.

Programs of Paddle may write files (`save_combine`) or call Python (`py_func`), and ONNX files may
name other files, whose bytes become weights. The digests of an export come from whoever made it, so
they do not help. Reading a model file here runs nothing, and what no export has is refused.
"""

import json
import re
from pathlib import Path

from paddle.base.proto import framework_pb2

from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.packages import import_extra

# All that the exporters of this version, of 0.1 and of 0.2 write with Paddle 2.6 and 3.0 to 3.3.
# In model.json, "1." stands for Paddle's operators, "0." for PIR's own, and "p" is a parameter;
# "1.mean" is of networks that are neither merged nor folded, which `benchmark inference` times.
JSON_OPERATORS = {
    "p", "0.combine", "1.abs", "1.add", "1.arange", "1.assign_value_", "1.batch_norm_", "1.cast",
    "1.clip", "1.concat", "1.conv2d", "1.data", "1.depthwise_conv2d", "1.divide", "1.fetch",
    "1.flatten", "1.floor_divide", "1.full", "1.full_int_array", "1.gelu", "1.greater_equal",
    "1.index_select", "1.less_than", "1.logical_and", "1.matmul", "1.mean", "1.minimum",
    "1.multiply", "1.pad3d", "1.pool2d", "1.relu", "1.reshape", "1.scale", "1.shape64", "1.slice",
    "1.squeeze", "1.stack", "1.subtract", "1.transpose", "1.unsqueeze",
}  # fmt: skip
PDMODEL_OPERATORS = {
    "abs", "assign_value", "batch_norm", "cast", "clip", "concat", "conv2d", "depthwise_conv2d",
    "elementwise_add", "elementwise_div", "elementwise_floordiv", "elementwise_min",
    "elementwise_mul", "elementwise_sub", "feed", "fetch", "fill_constant",
    "flatten_contiguous_range", "gelu", "greater_equal", "index_select", "less_than", "logical_and",
    "matmul_v2", "pad3d", "pool2d", "range", "relu", "reshape2", "scale", "shape", "slice",
    "squeeze2", "transpose2", "unsqueeze2",
}  # fmt: skip
ONNX_OPERATORS = {
    "Add", "And", "BatchNormalization", "Cast", "Concat", "Conv", "DequantizeLinear", "Div",
    "Flatten", "Gelu", "Gemm", "GlobalAveragePool", "GreaterOrEqual", "Less", "MatMul", "Mul",
    "QuantizeLinear", "Range", "Relu", "Resize", "Shape", "Squeeze", "Sub", "Transpose",
}  # fmt: skip

# Types, attributes, regions and blocks, which model.json names by the key of operators.
JSON_OTHERS = re.compile(r"[01]\.[at]_\w+|(region|block)_\d+")

MAX_PROGRAM_BYTES = 2**26  # without weights; exports have up to 2 million


def check_operators(path: Path) -> None:
    """Raise InputError unless the model file at `path` is one that exports have."""
    read, allowed = {
        ".json": (read_json, JSON_OPERATORS),
        ".pdmodel": (read_pdmodel, PDMODEL_OPERATORS),
        ".onnx": (read_onnx, ONNX_OPERATORS),
    }[path.suffix]
    try:
        if path.suffix != ".onnx" and path.stat().st_size > MAX_PROGRAM_BYTES:
            raise ValueError(f"it has more than {MAX_PROGRAM_BYTES:,} bytes")
        foreign = sorted(read(path) - allowed)
    except InputError:
        raise
    except Exception as error:  # whatever a parser says of a file that it cannot read
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{path} is not a model that can be read: {reason}; export it again"
        ) from None
    if foreign:
        raise InputError(
            f"{path} holds what no export has: {', '.join(foreign):.300}. It may read or write "
            "other files, so it is not opened; allowed: what replknet export wrote"
        )


def read_json(path: Path) -> set[str]:
    """Return the operators of a program of Paddle 3, of all blocks at every depth."""
    found = set()

    def note(pairs: list) -> None:
        found.update(value for key, value in pairs if key == "#" and isinstance(value, str))

    json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=note)
    return {name for name in found if not JSON_OTHERS.fullmatch(name)}


def read_pdmodel(path: Path) -> set[str]:
    """Return the operators of a program of Paddle 2, of all blocks."""
    program = framework_pb2.ProgramDesc.FromString(path.read_bytes())
    return {operator.type for block in program.blocks for operator in block.ops}


def read_onnx(path: Path) -> set[str]:
    """Return the operators of an ONNX file, and what else it holds that exports have not."""
    model = import_extra("onnx", "deploy").load(path, load_external_data=False)
    graph = model.graph
    found = {
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        for node in graph.node
    }
    attributes = (attribute for node in graph.node for attribute in node.attribute)
    others = {
        "weights in other files": any(
            weight.data_location or weight.external_data for weight in graph.initializer
        ),
        # A message is a tensor or a graph, which could name files or operators in turn.
        "attributes that are tensors or graphs": any(
            field.message_type for each in attributes for field, _ in each.ListFields()
        ),
        "sparse weights": graph.sparse_initializer,
        "functions": model.functions,
        "training": model.training_info,
    }
    return found | {what for what, is_there in others.items() if is_there}
