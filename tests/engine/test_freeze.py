"""Parts of a network that training leaves as they are."""

import re

import numpy as np
import paddle
import pytest
from epochs import CLASSES, make_batches, make_model, sgd, train, trainable_weights
from paddle import nn
from tiny import assert_identical, weights

from replknet_paddle.engine import precision
from replknet_paddle.engine import train as engine_train
from replknet_paddle.engine.precision import Precision
from replknet_paddle.model import RepLKNet
from replknet_paddle.optim.ema import ModelEma
from replknet_paddle.optim.losses import LabelSmoothingCrossEntropy
from replknet_paddle.optim.optimizer import freeze
from replknet_paddle.runtime.errors import InputError


def names_left(model) -> set[str]:
    return set(trainable_weights(model))


@pytest.mark.parametrize(
    "prefixes, pattern",
    [
        (["stem", "stages.0"], r"(stem|stages\.0)\."),
        (["stages.2.blocks.1"], r"stages\.2\.blocks\.1\."),  # not blocks.10 and blocks.11
        (["stages.1", "head.weight"], r"stages\.1\.|head\.weight$"),
        (["backbone"], r"(?!head\.)"),
    ],
)
def test_names_that_begin_with_a_prefix_are_not_trained(prefixes, pattern):
    model = RepLKNet(large_kernel_sizes=[3] * 4, layers=[1, 1, 6, 1], channels=[4] * 4)
    before = names_left(model)
    freeze(model, prefixes)
    frozen = before - names_left(model)
    assert frozen == {name for name in before if re.match(pattern, name)} and frozen


@pytest.mark.parametrize(
    "prefixes, says",
    [
        (["stem", "stagse.0"], "'stagse.0', which no name .* did you mean stages.0"),
        (["stage"], "allowed: backbone, stem, stages, transitions, norm, head, and names in them"),
        (["stages.2.blocks.1."], "did you mean stages.2.blocks.1?"),
        (["stem.0.norm._mean"], "which no name of a parameter begins with"),
        (["backbone", "head"], "is backbone, head, which leaves nothing to train"),
    ],
)
def test_what_cannot_be_frozen_is_refused(prefixes, says):
    model = make_model()
    before = names_left(model)
    with pytest.raises(InputError, match=says):
        freeze(model, prefixes)
    assert names_left(model) == before


def test_a_frozen_backbone_leaves_the_regression_of_its_features():
    """One step of gradient descent, by the closed form, on features of the network in evaluation,
    without drop path."""
    model = make_model(drop_path_rate=0.9)
    randomize(model)
    freeze(model, ["backbone"])
    before = weights(model)
    loader = make_batches([6])
    [(images, labels)] = loader.batches
    model.eval()
    maps = model.forward_features(paddle.to_tensor(images))
    x = model.forward_head(maps, pre_logits=True).numpy()
    logits = x @ before["head.weight"] + before["head.bias"]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = (probabilities - np.eye(CLASSES)[labels]) / 6
    ema = ModelEma(model, decay=0.99)
    optimizer = sgd(model)
    train(model, loader, optimizer, criterion=LabelSmoothingCrossEntropy(0.0), ema=ema)
    weight, bias = optimizer.gradients[0]
    np.testing.assert_allclose(weight, x.T @ error, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(bias, error.sum(0), rtol=1e-4, atol=1e-7)
    after, average = weights(model), ema.state()
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {"head.weight", "head.bias"}
    assert all(average[name].tobytes() == after[name].tobytes() for name in before.keys() - changed)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("head."))


def randomize(model) -> None:
    """Running statistics that a batch's would change."""
    rng = np.random.default_rng(5)
    for layer in model.sublayers():
        if hasattr(layer, "_variance"):
            layer._mean.set_value(rng.normal(0, 0.1, layer._mean.shape).astype("float32"))
            layer._variance.set_value(rng.uniform(0.5, 2, layer._mean.shape).astype("float32"))


def test_frozen_layers_stay_as_they_are_after_evaluations_and_others_train(monkeypatch):
    model = make_model(drop_path_rate=0.5)
    freeze(model, ["stages.1", "transitions.1.0.norm", "head.bias"])
    averaged = []
    monkeypatch.setattr(engine_train, "average_over_ranks", averaged.extend)
    before = weights(model)
    for epoch in range(2):
        train(model, make_batches([4] * 2), sgd(model), epoch=epoch)
        model.eval()
    after = weights(model)
    same = {name for name in before if before[name].tobytes() == after[name].tobytes()}
    frozen = r"stages\.1\.|transitions\.1\.0\.norm\.|head\.bias"
    assert same == {name for name in before if re.match(frozen, name)}
    # The means over several processes round: nothing frozen is replaced by one.
    state = {id(tensor): name for name, tensor in model.state_dict().items()}
    assert {state[id(tensor)] for tensor in averaged} == {
        name for name in before if re.search(r"\._(mean|variance)$", name) and name not in same
    }


def test_recomputed_blocks_train_to_the_same_bits():
    """Behind a frozen stem, of two stages with a frozen block each."""
    results = []
    for recompute in (False, True):
        model = make_model(drop_path_rate=0.5)
        for stage in model.stages:
            stage.recompute = recompute
        freeze(model, ["stem", "stages.0.blocks.0", "stages.2.blocks.1"])
        train(model, make_batches([4] * 3), sgd(model))
        results.append(weights(model))
    assert_identical(*results)


def test_a_frozen_norm_no_longer_synchronizes():
    """Paddle's synchronized one has no gradient by running statistics, and does not run on CPU."""
    model = make_model()
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(make_model())
    for network in (model, synchronized):
        network.set_state_dict(make_model(seed=3).state_dict())
        randomize(network)
        freeze(network, ["backbone"])
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in synchronized.sublayers())
    for network in (model, synchronized):
        train(network, make_batches([4]), sgd(network))
    assert_identical(weights(model), weights(synchronized))


def test_frozen_weights_stay_float32_where_others_become_half(monkeypatch):
    """As Paddle is asked to keep them; it changes none on CPU."""
    asked = {}
    monkeypatch.setattr(precision.processes, "on_gpu", lambda: True)
    monkeypatch.setattr(paddle.amp, "decorate", lambda **options: asked.update(options))
    model = make_model()
    freeze(model, ["stem", "stages.3", "head.bias"])
    Precision(enabled=True, level="O2").prepare(model)
    kept = {id(layer) for layer in asked["excluded_layers"]}
    for name, layer in model.named_sublayers():
        if isinstance(layer, (nn.Conv2D, nn.Linear)):
            assert (id(layer) in kept) == name.startswith(("stem.", "stages.3.", "head")), name
