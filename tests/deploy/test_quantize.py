"""INT8: calibrated on the images given, close to float32, and in integers."""

import numpy as np
import pytest
from small_networks import images, logits, small_config, small_network

from replknet_paddle.deploy import open_backend
from replknet_paddle.deploy.export import ModelInfo, export_model
from replknet_paddle.deploy.quantize import compare, spread_batches
from replknet_paddle.runtime.errors import InputError, SampleError

pytestmark = pytest.mark.numbers


@pytest.fixture
def int8(tmp_path):
    """Exports a small network in INT8, calibrated on the batches given."""
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    config = small_config(tmp_path)
    model = small_network(config)

    def export(calibration):
        info = ModelInfo(config, "onnx", "int8")
        export_model(model, tmp_path / "dst", info, calibration=calibration)
        return tmp_path / "dst"

    return export, model


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_int8_is_close_to_float32(int8, name):
    pytest.importorskip(name)
    export, model = int8
    backend = open_backend(export(images(8, seed=i) for i in range(4)), name, threads=1)
    outputs, reference = backend.run(images(16)), logits(model, images(16))
    # A network of 4 to 10 random channels leaves 8 bits little to average over.
    assert np.corrcoef(outputs.reshape(-1), reference.reshape(-1))[0, 1] > 0.8
    assert np.abs(outputs - reference).max() > 1e-3


def test_the_convolutions_between_stem_and_head_have_8_bit_weights(int8):
    onnx = pytest.importorskip("onnx")
    export, _ = int8
    graph = onnx.load(export([images(8)]) / "model.onnx").graph
    dtypes = {weight.name: weight.data_type for weight in graph.initializer}
    for node in (node for node in graph.node if node.op_type in ("Conv", "Gemm")):
        is_float = dtypes.get(node.input[1]) == onnx.TensorProto.FLOAT
        assert is_float == node.name.startswith(("stem", "head")), node.name


def test_the_calibration_images_decide_the_scales(int8):
    export, _ = int8
    narrow = open_backend(export([0.01 * images(8)]), "onnxruntime").run(images(4))
    wide = open_backend(export([images(8)]), "onnxruntime").run(images(4))
    assert not np.allclose(narrow, wide, atol=1e-3)


def test_no_calibration_image_is_an_error(int8, tmp_path):
    export, _ = int8
    with pytest.raises(InputError, match="no image to calibrate"):
        export([])
    assert not (tmp_path / "dst").exists()


class Listed:
    """A dataset whose images are their index; some of them cannot be read."""

    def __init__(self, length, bad=()):
        self.length = length
        self.bad = bad

    def __len__(self):
        return self.length

    def __getitem__(self, sample):
        epoch, index = sample
        assert epoch == 0
        if index in self.bad:
            raise SampleError(f"list, line {index}: cannot read image")
        return np.full((3, 2, 2), index, "float32"), np.int64(index % 3)


@pytest.mark.parametrize("bad", [{0}, {3, 4}, {9}, {1, 8, 9}])
def test_as_many_unreadable_images_are_left_out_as_in_training(caplog, bad):
    batches = list(spread_batches(Listed(10, bad), 10, batch_size=4, max_bad_images=3))
    read = [int(value) for images, _ in batches for value in images[:, 0, 0, 0]]
    assert read == [i for i in range(10) if i not in bad]
    assert caplog.text.count("it is left out") == len(bad)
    with pytest.raises(SampleError, match=f"number {len(bad)}; DATA.MAX_BAD_IMAGES allows"):
        list(spread_batches(Listed(10, bad), 10, max_bad_images=len(bad) - 1))


@pytest.mark.parametrize(
    "length, count, indices", [(101, 5, [0, 25, 50, 75, 100]), (3, 9, [0, 1, 2]), (9, 1, [0])]
)
def test_images_are_taken_from_the_whole_list(length, count, indices):
    batches = list(spread_batches(Listed(length), count, batch_size=2))
    assert [int(image[0, 0, 0]) for batch, _ in batches for image in batch] == indices
    assert [int(label) for _, labels in batches for label in labels] == [i % 3 for i in indices]
    assert all(1 <= len(batch) <= 2 for batch, _ in batches)


def test_accuracy_before_and_after_is_counted():
    class Says:
        def __init__(self, *labels):
            self.labels = iter(labels)

        def run(self, batch):
            return np.eye(3, dtype="float32")[[next(self.labels) for _ in batch]]

    batches = [(images(2), np.array([0, 1])), (images(1), np.array([2]))]
    result = compare(Says(0, 1, 2), Says(0, 2, 2), batches)
    assert (result.images, result.before, result.after, result.same) == (3, 3, 2, 2)
    assert "100.00 % (3/3) before, 66.67 % (2/3) after" in str(result)


def test_no_readable_image_is_nothing_to_compare():
    assert str(compare(None, None, [])) == "not compared, since no image is readable"
