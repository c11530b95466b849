"""A model file is read before a library opens it, and what no export has is refused.

The attacks are exports as a stranger might send them: their digests are right.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from paddle.base.proto import framework_pb2
from small_networks import images, small_config, small_network
from tiny import FIXTURES, command

from replknet_paddle.deploy import Predictor, get_model, open_backend
from replknet_paddle.deploy import operators as module
from replknet_paddle.deploy.export import ModelInfo, export_model, write_record
from replknet_paddle.deploy.operators import check_operators
from replknet_paddle.runtime.errors import InputError

pytestmark = pytest.mark.paddle_version

PICTURE = str(FIXTURES / "images" / "landscape_499x375.jpg")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    config = small_config(folder)
    export_model(small_network(config), folder / "paddle", ModelInfo(config))
    return folder


@pytest.fixture
def folder(tmp_path, originals):
    """A copy of an export of format `paddle`."""
    return Path(shutil.copytree(originals / "paddle", tmp_path / "export"))


@pytest.fixture
def onnx_folder(tmp_path):
    """An export of format `onnx`."""
    pytest.importorskip("onnx")
    config = small_config(tmp_path)
    export_model(small_network(config), tmp_path / "export", ModelInfo(config, "onnx"))
    return tmp_path / "export"


def sign(folder, format="paddle"):
    """Write the record of an export folder, with the digests of what is in it."""
    write_record(ModelInfo(small_config(folder.parent), format), folder)


def attribute(name, kind, value):
    return {"N": name, "AT": {"#": kind, "D": value}}


def saving(operators, path) -> list:
    """Two operators of PIR, with which Paddle writes the first parameter to a file."""
    parameter = operators[0]["O"]
    kind = {"#": "0.t_vec", "D": [parameter["TT"]]}
    return [
        {"#": "0.combine", "A": [], "I": [{"%": parameter["%"]}], "O": [{"%": 9999, "TT": kind}]},
        {
            "#": "1.save_combine",
            "A": [
                attribute("file_path", "0.a_str", str(path)),
                attribute("overwrite", "0.a_bool", True),
                attribute("save_as_fp16", "0.a_bool", False),
                attribute("save_to_memory", "0.a_bool", False),
            ],
            "I": [{"%": 9999}],
            "O": [{"%": 0, "TT": {"#": "NULL"}}],
        },
    ]


def write_json(folder, victim, depth):
    """Let model.json save a parameter, in as many regions as `depth` says."""
    program = json.loads((folder / "model.json").read_text())
    operators = program["program"]["regions"][0]["blocks"][0]["ops"]
    added = saving(operators, victim)
    for level in range(depth):
        block = {"#": f"block_{level + 1}", "args": [], "ops": added}
        region = {"#": f"region_{level + 1}", "blocks": [block]}
        result = [{"%": 10000 + level, "TT": operators[0]["O"]["TT"]}]
        added = [{"#": "1.relu", "A": [], "I": [], "O": result, "regions": [region]}]
    first = next(i for i, operator in enumerate(operators) if operator["#"] == "1.data")
    operators[first + 1 : first + 1] = added
    (folder / "model.json").write_text(json.dumps(program))


def write_pdmodel(folder, victim, depth):
    """Put a program of Paddle 2 into the place of model.json, which saves a parameter in its block
    number `depth`."""
    (folder / "model.json").unlink()
    program = framework_pb2.ProgramDesc()
    for index in range(depth + 1):
        program.blocks.add(idx=index, parent_idx=index - 1)
    operator = program.blocks[depth].ops.add(type="save_combine")
    operator.attrs.add(name="file_path", type=framework_pb2.STRING, s=str(victim))
    (folder / "model.pdmodel").write_bytes(program.SerializeToString())


@pytest.mark.parametrize("depth", [0, 1, 2, 40])
@pytest.mark.parametrize("write", [write_json, write_pdmodel])
def test_a_program_that_writes_is_not_opened(folder, tmp_path, write, depth):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    write(folder, victim, depth)
    sign(folder)
    for open_it in (open_backend, Predictor, get_model):
        with pytest.raises(InputError, match="holds what no export has: (1.)?save_combine"):
            open_it(folder)
    assert command("predict")([str(folder), PICTURE]) == 2
    assert victim.read_text() == "precious"


def test_evaluation_does_not_open_it_either(folder, tmp_path, tiny_data, capfd):
    victim = tmp_path / "victim"
    write_json(folder, victim, 0)
    sign(folder)
    flags = [f"-pretrained={folder}", f"-data_path={tiny_data}", f"-output={tmp_path / 'run'}"]
    assert command("eval")(flags) == 2
    said = capfd.readouterr().err
    assert said.count("holds what no export has: 1.save_combine") == 1 and "Traceback" not in said
    assert not victim.exists()


@pytest.mark.parametrize(
    "text",
    [
        # The last of two equal keys counts for some readers, the first for others.
        '{"#": "1.relu", "#": "1.save_combine"}',
        '{"#": "1.save_combine", "#": "1.relu"}',
        '{"\\u0023": "1.print"}',
        '[[{"A": [{"#": "1.t_save"}], "x": {"#": "pd_op.save_combine"}}]]',
        '{"#": "3.a_custom"}',
        '{"#": "0.load"}',
        '{"#": "1.run_program"}',
        '{"#": "block_1.py_func"}',
    ],
)
def test_operators_are_found_wherever_they_stand(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(InputError, match="holds what no export has"):
        check_operators(tmp_path / "model.json")


@pytest.mark.parametrize("name", ["model.json", "model.pdmodel"])
@pytest.mark.parametrize("content", [b"[" * 10**6, b'{"#":' * 10**5, b"\xff\xfe[", b"{", None])
def test_what_is_no_program_is_one_message(tmp_path, monkeypatch, name, content):
    if content is None:
        monkeypatch.setattr(module, "MAX_PROGRAM_BYTES", 1000)
        content = b" " * 1001
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is not a model that can be read: .* again$"):
        check_operators(tmp_path / name)


# ---- ONNX


def custom_domain(onnx, model):
    model.graph.node[1].domain = "com.microsoft"


def unknown_operator(onnx, model):
    model.graph.node[1].op_type = "If"


def external_weight(onnx, model):
    weight = model.graph.initializer[0]
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../victim")
    weight.ClearField("raw_data")


def external_attribute(onnx, model):
    attribute = onnx.helper.make_attribute("value", onnx.TensorProto(name="x"))
    external = attribute.t
    external.data_location = onnx.TensorProto.EXTERNAL
    external.external_data.add(key="location", value="../victim")
    model.graph.node[0].attribute.append(attribute)


def subgraph(onnx, model):
    graph = onnx.helper.make_graph([], "inner", [], [])
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("body", graph))


def sparse_weight(onnx, model):
    model.graph.sparse_initializer.add().dims.append(2)


def function(onnx, model):
    model.functions.add(name="Relu", domain="")


@pytest.mark.parametrize(
    "spoil, says",
    [
        (custom_domain, "com.microsoft.Relu"),
        (unknown_operator, "If"),
        (external_weight, "weights in other files"),
        (external_attribute, "attributes that are tensors or graphs"),
        (subgraph, "attributes that are tensors or graphs"),
        (sparse_weight, "sparse weights"),
        (function, "functions"),
    ],
)
@pytest.mark.parametrize("name", ["auto", "onnxruntime", "openvino"])
def test_an_onnx_file_that_needs_more_than_itself_is_not_opened(onnx_folder, name, spoil, says):
    onnx = pytest.importorskip("onnx")
    if name != "auto":
        pytest.importorskip(name)
    (onnx_folder.parent / "victim").write_bytes(np.zeros(9999, "float32").tobytes())
    path = onnx_folder / "model.onnx"
    model = onnx.load(path)
    spoil(onnx, model)
    path.write_bytes(model.SerializeToString())
    sign(onnx_folder, "onnx")
    with pytest.raises(InputError, match=f"holds what no export has: {says}"):
        open_backend(onnx_folder, name)


def test_int8_is_opened(tmp_path):
    pytest.importorskip("onnxruntime")
    config = small_config(tmp_path)
    info = ModelInfo(config, "onnx", "int8")
    export_model(small_network(config), tmp_path / "x", info, calibration=[images(2)])
    assert open_backend(tmp_path / "x", "onnxruntime").run(images(1)).shape == (1, 5)
