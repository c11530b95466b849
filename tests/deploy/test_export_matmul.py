"""Exports whose large kernels are matrix products, and half precision without them on GPU."""

import numpy as np
import paddle
import pytest
from small_networks import FORMS, assert_same, images, logits, small_config, small_network

from replknet_paddle.deploy import open_backend
from replknet_paddle.deploy.export import PADDLE_MODEL_FILES, check_combination, export_model
from replknet_paddle.deploy.sidecar import Sidecar
from replknet_paddle.runtime.errors import InputError

pytestmark = pytest.mark.paddle_version


def operations(folder):
    """Names of the operations of an export's program."""
    program = paddle.jit.load(str(folder / "model")).program()
    return [op.name() if hasattr(op, "name") else op.type for op in program.global_block().ops]


@pytest.mark.parametrize("form", FORMS)
def test_large_kernels_are_products_and_logits_stay(form, tmp_path):
    config = small_config(tmp_path, form)
    model = small_network(config)
    for name in ("paddle", "matmul"):
        sidecar = Sidecar.build(config, format="paddle", fixed_size=name == "matmul")
        export_model(model, tmp_path / name, sidecar)
    assert any((tmp_path / "matmul" / name).exists() for name in PADDLE_MODEL_FILES)

    def count(name, *words):
        return sum(any(word in op for word in words) for op in operations(tmp_path / name))

    large = 5  # blocks, each of which has one, merged
    products = count("matmul", "matmul") - count("paddle", "matmul")
    gathers = count("matmul", "index_select")
    assert products == large and gathers >= 2 * large and count("paddle", "index_select") == 0
    backend = open_backend(tmp_path / "matmul", "paddle")
    for batch in (1, 3):
        assert_same(backend.run(images(batch)), logits(model, images(batch)), 1e-5)
    with pytest.raises(InputError, match="40 x 40 pixels; this export takes 32 x 32 alone"):
        backend.run(np.zeros((1, 3, 40, 40), "float32"))


def test_the_option_is_refused_where_it_has_no_meaning():
    check_combination("paddle", "fp16", "matmul")
    with pytest.raises(InputError, match="-conv_impl matmul with -format onnx"):
        check_combination("onnx", "fp32", "matmul")
    with pytest.raises(InputError, match="-conv_impl fft; allowed: paddle, matmul"):
        check_combination("paddle", "fp32", "fft")
