"""Parts of a network that training leaves as they are."""

import re

import numpy as np
import paddle
import pytest
from epochs import CLASSES, make_batches, make_model, sgd, train, trainable_weights
from paddle import nn
from tiny import assert_identical, same_bits, weights

from replknet_paddle.engine import precision
from replknet_paddle.model import RepLKNet
from replknet_paddle.optim.ema import ModelEma
from replknet_paddle.optim.losses import LabelSmoothingCrossEntropy
from replknet_paddle.optim.optimizer import freeze
from replknet_paddle.runtime.errors import InputError


def test_names_that_begin_with_a_prefix_are_not_trained():
    model = RepLKNet(large_kernel_sizes=[3] * 4, layers=[1, 1, 6, 1], channels=[4] * 4)
    before = trainable_weights(model).keys()
    freeze(model, ["stages.2.blocks.1", "head.weight"])  # but not stages.2.blocks.10
    frozen = before - trainable_weights(model).keys()
    assert frozen == {n for n in before if re.match(r"stages\.2\.blocks\.1\.|head\.weight$", n)}


def test_what_cannot_be_frozen_is_refused():
    for prefixes, says in (
        (["stem", "stagse.0"], "'stagse.0', which no name .* did you mean stages.0"),
        (["stem.0.norm._mean"], "allowed: backbone, stem, stages, transitions, norm, head, and"),
        (["backbone", "head"], "is backbone, head, which leaves nothing to train"),
    ):
        with pytest.raises(InputError, match=says):
            freeze(make_model(), prefixes)


def test_a_frozen_backbone_leaves_the_regression_of_its_features():
    """One step of gradient descent, by the closed form, on features of the network in evaluation,
    without drop path. Paddle's synchronized batch norm has no gradient then, and none on CPU."""
    model = make_model(drop_path_rate=0.9)
    for norm in [layer for layer in model.sublayers() if hasattr(layer, "_momentum")]:
        norm._momentum = 0.0  # the statistics of another batch
    model(paddle.randn([8, 3, 32, 32]))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    freeze(model, ["backbone"])
    model.eval()
    before, loader, ema = weights(model), make_batches([6]), ModelEma(model, decay=0.99)
    [(images, labels)] = loader.batches
    maps = model.forward_features(paddle.to_tensor(images))
    x = model.forward_head(maps, pre_logits=True).numpy()
    logits = x @ before["head.weight"] + before["head.bias"]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = (probabilities - np.eye(CLASSES)[labels]) / 6
    optimizer = sgd(model)
    train(model, loader, optimizer, criterion=LabelSmoothingCrossEntropy(0.0), ema=ema)
    for got, wanted in zip(optimizer.gradients[0], (x.T @ error, error.sum(0)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
    kept = before.keys() - {"head.weight", "head.bias"}
    assert same_bits(before, weights(model)) == same_bits(before, ema.state()) == kept
    assert all(p.grad is None for name, p in model.named_parameters() if name in kept)


def test_frozen_layers_stay_so_after_evaluations_while_others_train():
    """With recomputed blocks, too, to the same bits."""
    frozen = ["stem", "stages.0.blocks.0", "stages.2.blocks.1", "transitions.1.0.norm", "head.bias"]
    results = []
    for recompute in (False, True):
        model = make_model(drop_path_rate=0.5)
        for stage in model.stages:
            stage.recompute = recompute
        freeze(model, frozen)
        before = weights(model)
        for epoch in range(2):
            train(model, make_batches([4] * 2), sgd(model), epoch=epoch)
            model.eval()
        results.append(weights(model))
        kept = same_bits(before, results[-1])
        assert kept == {n for n in before if f"{n}.".startswith(tuple(f"{p}." for p in frozen))}
    assert_identical(*results)


def test_frozen_weights_stay_float32_where_others_become_half(monkeypatch):
    """As Paddle is asked to keep them; it changes none on CPU."""
    asked, model = {}, make_model()
    monkeypatch.setattr(precision.processes, "on_gpu", lambda: True)
    monkeypatch.setattr(paddle.amp, "decorate", lambda **options: asked.update(options))
    freeze(model, ["stem", "stages.3", "head.bias"])
    precision.Precision(enabled=True, level="O2").prepare(model)
    kept = {id(layer) for layer in asked["excluded_layers"]}
    for name, layer in model.named_sublayers():
        if isinstance(layer, (nn.Conv2D, nn.Linear)):
            assert (id(layer) in kept) == name.startswith(("stem.", "stages.3.", "head")), name
