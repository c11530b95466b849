"""The public API as README and docs use it: `test_types.py` has mypy read this, and runs it."""

import sys
from pathlib import Path

import numpy as np
import paddle
from numpy.typing import NDArray
from typing_extensions import assert_type
from yacs.config import CfgNode

import config as config_of_paddlevit
import replknet as network_of_paddlevit
import replknet_paddle
from replknet_paddle import get_config, get_model, inference_model, list_models, load_pretrained
from replknet_paddle.deploy import Backend, Predictor, open_backend
from replknet_paddle.deploy.backends import BackendLayer
from replknet_paddle.deploy.predict import Classification
from replknet_paddle.model import RepLKNet
from replknet_paddle.ops import (
    large_kernel_depthwise_conv2d,
    use_fast_depthwise_conv,
    use_fast_pointwise_conv,
    use_large_kernel_ops,
)

Maps = tuple[paddle.Tensor, ...]


def use(run: Path, picture: str) -> None:
    """Use the run folder of a classifier, on a picture."""
    config = get_config(run / "config.yaml", MODEL__DROPPATH=0.1)
    assert_type(config, CfgNode)
    assert_type(config_of_paddlevit.get_config("./configs/replknet_31b.yaml"), CfgNode)
    model = replknet_paddle.build_replknet(config)
    assert_type(model, RepLKNet)
    assert_type(network_of_paddlevit.build_replknet(config), RepLKNet)
    load_pretrained(model, run / "best", weights="model")
    model.eval()

    images = paddle.zeros([1, 3, 64, 64])
    assert_type(model.extract_feat(images), Maps)
    assert_type(model.forward(images), paddle.Tensor | Maps)
    features = model.forward_features(images)
    assert_type(features, paddle.Tensor)
    assert_type(model.forward_head(features, pre_logits=True), paddle.Tensor)
    assert_type(model.num_features, int)
    assert_type(model.feature_channels, tuple[int, ...])
    assert_type(model.config, CfgNode)
    assert_type(use_fast_depthwise_conv(model), int)
    assert_type(use_fast_pointwise_conv(model), int)
    assert_type(use_large_kernel_ops(model, "paddle"), str)
    kernels = paddle.ones([model.num_features, 1, 13, 13])
    assert_type(large_kernel_depthwise_conv2d(features, kernels, impl="paddle"), paddle.Tensor)

    predictor = Predictor(model, backend="eager")
    assert_type(predictor.class_names, list[str])
    assert_type(predictor.backend, Backend)
    assert_type(predictor.scores(predictor.preprocess(picture)[None]), NDArray[np.float32])
    answer = inference_model(model, picture)
    assert_type(answer, Classification)
    assert_type(answer["pred_class"], str)
    pictures = [picture, picture]
    assert_type(inference_model(predictor, pictures), list[Classification])
    model.structural_reparam()
    model.reset_classifier(0)
    outputs = open_backend(model, "eager").run(np.zeros((1, 3, 64, 64), np.float32))
    assert_type(outputs, NDArray[np.float32])

    assert_type(list_models("*384*"), list[str])
    with paddle.LazyGuard():
        assert_type(get_model("replknet-31b-1k-224", drop_path_rate=0.1), RepLKNet)
        assert_type(get_model("replknet-31b-1k-224", features_only=True), RepLKNet)
    # A path may be that of an export, of which a backend runs the whole.
    assert_type(get_model(run, num_classes=0), RepLKNet | BackendLayer)


if __name__ == "__main__":
    use(Path(sys.argv[1]), sys.argv[2])
