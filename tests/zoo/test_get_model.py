"""`get_model` as users of timm and mmpretrain call it."""

import dataclasses
import logging
import re
import shutil

import numpy as np
import paddle
import pytest
from harness import make_run
from tiny import FIXTURES, command

from replknet_paddle import get_config, get_model
from replknet_paddle.checkpoints.checkpoint_file import config_text
from replknet_paddle.checkpoints.load import load_state
from replknet_paddle.checkpoints.run_folder import (
    Checkpoint,
    Progress,
    path_at,
    point_to,
    save_checkpoint,
)
from replknet_paddle.deploy import Predictor, open_backend
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.zoo import find_record

WEIGHTS = FIXTURES / "tiny31_paddlevit.pdparams"


def test_a_new_head_is_made_for_other_classes_and_said(config_file, caplog):
    with caplog.at_level(logging.WARNING):
        model = get_model(config_file("tiny31"), pretrained=WEIGHTS, num_classes=3)
    assert "10 classes" in caplog.text and "fresh one for 3 classes" in caplog.text
    assert model.head.weight.shape == [32, 3]
    same = get_model(config_file("tiny31"), pretrained=WEIGHTS)
    for name, value in same.state_dict().items():
        if not name.startswith("head."):
            assert np.array_equal(model.state_dict()[name].numpy(), value.numpy()), name


def test_the_head_of_the_file_is_kept_where_it_fits(config_file, caplog):
    with caplog.at_level(logging.WARNING):
        model = get_model(config_file("tiny31"), pretrained=WEIGHTS, num_classes=10)
    assert "fresh" not in caplog.text
    same = get_model(config_file("tiny31"), pretrained=WEIGHTS)
    assert np.array_equal(model.head.weight.numpy(), same.head.weight.numpy())


def test_weights_of_other_classes_are_an_error_without_num_classes(config_file):
    with pytest.raises(InputError, match="set MODEL.NUM_CLASSES: 10"):
        get_model(config_file("tiny31"), pretrained=WEIGHTS, MODEL__NUM_CLASSES=3)


@pytest.mark.parametrize("pretrained", [1, 2.5, b"x", ["x"]])
def test_other_things_than_a_path_or_a_choice_are_named(config_file, pretrained):
    with pytest.raises(InputError, match=f"pretrained is {re.escape(repr(pretrained))}; allowed:"):
        get_model(config_file("tiny31"), pretrained=pretrained)


def test_no_path_is_no_file(config_file):
    """As of a variable of the shell that is not set."""
    with pytest.raises((InputError, FileNotFoundError)):
        get_model(config_file("tiny31"), pretrained="")


@pytest.mark.parametrize("indices", [None, (0, 1, 2, 3), (3,), (2, 0)])
def test_features_are_as_announced(config_file, indices):
    model = get_model(config_file("tiny31"), out_indices=indices)
    maps = model.extract_feat(paddle.zeros([1, 3, 64, 64]))
    assert tuple(m.shape[1] for m in maps) == model.feature_channels
    assert tuple(64 // m.shape[2] for m in maps) == model.feature_strides
    assert hasattr(model, "head") == (indices is None)


def test_published_backbones_announce_their_maps():
    model = get_model("replknet-31b-1k-224", out_indices=(1, 3), MODEL__LAYERS=[1, 1, 1, 1])
    assert (model.feature_channels, model.feature_strides) == ((256, 1024), (8, 32))


def test_keys_are_overridden_and_checked(config_file):
    model = get_model(config_file("tiny31"), MODEL__DROPPATH=0.25)
    assert model.config.MODEL.DROPPATH == 0.25
    assert get_config(config_file("tiny31"), SEED=7, MODEL__NUM_CLASSES=5).SEED == 7
    with pytest.raises(InputError, match="unknown key MODEL.DROP_PATH; did you mean MODEL.DROPP"):
        get_model(config_file("tiny31"), MODEL__DROP_PATH=0.25)
    with pytest.raises(InputError, match="MODEL.NUM_CLASSES is -1; allowed: an integer >= 0"):
        get_model(config_file("tiny31"), num_classes=-1)


def test_no_classes_give_the_features_that_the_head_of_the_file_takes(config_file, caplog):
    expected = np.load(FIXTURES / "tiny31_expected.npz")
    head = load_state(WEIGHTS)
    with caplog.at_level(logging.WARNING):
        model = get_model(config_file("tiny31"), pretrained=WEIGHTS, num_classes=0)
    assert caplog.text == ""
    with paddle.no_grad():
        features = model(paddle.to_tensor(expected["images"])).numpy()
    assert features.shape == (len(expected["images"]), model.num_features)
    logits = features @ head["head.weight"] + head["head.bias"]
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    model.reset_classifier(3)  # to be trained
    assert model.config.MODEL.NUM_CLASSES == 3


def test_the_words_of_timm_mean_the_keys_of_the_configuration(config_file):
    images = paddle.to_tensor(np.load(FIXTURES / "tiny31_expected.npz")["images"])
    by_timm, by_key = (
        get_model(config_file("tiny31"), pretrained=WEIGHTS, **keys)
        for keys in (
            {"features_only": True, "drop_path_rate": 0.3},
            {"out_indices": (0, 1, 2, 3), "MODEL__DROPPATH": 0.3},
        )
    )
    assert by_timm.config == by_key.config and len(by_timm(images)) == 4
    for one, other in zip(by_timm(images), by_key(images)):
        assert np.array_equal(one.numpy(), other.numpy())
    chosen = get_model(config_file("tiny31"), features_only=True, out_indices=(1, 3))
    assert chosen.out_indices == (1, 3)
    rates = [block.drop_path.rate for stage in by_timm.stages for block in stage.blocks]
    assert (rates[0], rates[-1]) == (0, 0.3)


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("replknet-31b-1k-244", "replknet-31b-1k-224"),
        ("RepLKNet_31B_22k", "replknet-31b-22k"),
        ("replknet-31l-3rdparty_in1k-384px", "replknet-31B_3rdparty_in1k-384px"),
        ("output/run", None),
    ],
)
@pytest.mark.parametrize("open_it", [get_model, open_backend])
def test_a_mistyped_name_suggests_the_nearest(open_it, typed, meant):
    with pytest.raises((InputError, FileNotFoundError)) as caught:
        open_it(typed)
    assert "replknet-xl-73m1k-320" in str(caught.value)
    assert str(caught.value).partition("; did you mean ")[2] == (f"{meant}?" if meant else "")


def test_configs_of_the_project_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert get_config("configs/replknet_nano.yaml").MODEL.NUM_CLASSES == 10
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "replknet_nano.yaml").write_text("MODEL: {NUM_CLASSES: 4}")
    assert get_config("configs/replknet_nano.yaml").MODEL.NUM_CLASSES == 4  # one's own comes first


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A run folder, and what is made of it: by name, the path of each."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "run").mkdir()
    run, progress = make_run(folder / "run"), Progress(epoch=1, step=3)
    text, state = config_text(get_config(run / "config.yaml")), load_state(run / "best")
    path = path_at(str(run), progress)
    save_checkpoint(path, Checkpoint(text, progress, state, class_names=CLASSES))
    point_to(str(run), "best", path)
    (folder / "out").mkdir()
    made = {name: folder / "out" / name for name in ("copied", "merged.safetensors", "exported")}
    shutil.copy(run / "best", made["copied"])
    assert command("merge")([str(run), "-output", str(made["merged.safetensors"])]) == 0
    assert command("export")([str(run), "-output", str(made["exported"])]) == 0
    return {"run": run, "best": run / "best", **made}


@pytest.fixture(scope="module")
def features(sources, tmp_path_factory):
    """The run folder without its head: the network, and what commands made of it, by name."""
    folder = tmp_path_factory.mktemp("features")
    for name, target in (("merge", "merged.safetensors"), ("export", "exported")):
        arguments = ["-output", str(folder / target), "-opts", "MODEL.NUM_CLASSES", "0"]
        assert command(name)([str(sources["run"]), *arguments]) == 0
    model = get_model(sources["run"], num_classes=0)
    return {"network": model, **{path.name: path for path in folder.iterdir()}}


@pytest.mark.parametrize("backend", ["eager", "paddle", "onnxruntime", "openvino"])
def test_features_are_exported_and_merged_like_logits(features, backend):
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype("float32")
    with paddle.no_grad():
        wanted = features["network"](paddle.to_tensor(images)).numpy()
    assert features["network"].class_names is None
    names = ["network", "merged.safetensors"] + ["exported"] * (backend == "paddle")
    for name in names:
        found = open_backend(features[name], backend).run(images)
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max(), name
    assert get_model(features["merged.safetensors"]).class_names is None


def test_what_needs_classes_refuses_a_network_of_none(features, sources, capsys):
    for name in features:
        with pytest.raises(InputError, match="gives features, not classes"):
            Predictor(features[name], backend="eager" if name == "network" else "auto")
    arguments = ["-cfg", str(sources["run"] / "config.yaml"), "-pretrained", str(sources["best"])]
    for name in ("train", "eval"):
        assert command(name)([*arguments, "-opts", "MODEL.NUM_CLASSES", "0"]) == 2
        assert "MODEL.NUM_CLASSES is 0, which makes a network without a" in capsys.readouterr().err


CLASSES = ("cat", "dog", "fish", "bird")
NAMES = ["run", "best", "copied", "merged.safetensors", "exported"]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_explains_itself(sources, name):
    config = get_config(sources["run"] / "config.yaml")
    wanted = get_model(config, pretrained=sources["run"] / "best")
    found = get_model(sources[name])
    images = paddle.to_tensor(
        np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype("float32")
    )
    with paddle.no_grad():
        logits = wanted(images).numpy()
        assert np.allclose(found(images).numpy(), logits, atol=1e-4 * np.abs(logits).max())
    assert not found.training
    assert found.config.MODEL.NAME == "tiny" and tuple(found.class_names) == CLASSES
    assert found.config.MODEL.SMALL_KERNEL_MERGED == (name == "merged.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_every_command_opens_it(sources, name, capsys):
    pictures = str(FIXTURES / "images" / "landscape_499x375.jpg")
    assert command("predict")([str(sources[name]), pictures, "-backend=paddle"]) == 0
    said = capsys.readouterr().out
    assert command("predict")([str(sources["run"]), pictures, "-backend=paddle"]) == 0
    assert said == capsys.readouterr().out


def test_an_export_is_as_it_was_made(sources):
    with pytest.raises(InputError, match="num_classes of .*exported, an export"):
        get_model(sources["exported"], num_classes=3)


def test_a_published_name_is_not_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "replknet-31b-1k-224").mkdir()
    model = get_model("replknet-31b-1k-224", out_indices=(3,), MODEL__LAYERS=[1, 1, 1, 1])
    assert model.feature_channels == (1024,)


def test_a_published_name_is_opened_with_its_weights(config_file, monkeypatch):
    """By what predicts and serves; `get_model` wants pretrained=True for them."""
    record = dataclasses.replace(find_record("replknet-31b-1k-224"), config=config_file("tiny31"))
    monkeypatch.setattr("replknet_paddle.zoo.MODELS", (record,))
    monkeypatch.setattr("replknet_paddle.zoo.download.fetch", lambda wanted: WEIGHTS)
    images, logits = map(np.load(FIXTURES / "tiny31_expected.npz").get, ("images", "logits"))
    for name in (record.name, record.alias):
        backend = open_backend(name, "eager")
        assert abs(backend.run(images) - logits).max() <= 1e-4
    assert abs(get_model(name)(paddle.to_tensor(images)).numpy() - logits).max() > 0.01


def test_a_run_of_segmentation_is_named_as_such(tmp_path):
    """Its configuration gives the backbone, for a classifier's weights."""
    (tmp_path / "best").write_bytes((FIXTURES / "upernet_official.pth").read_bytes())
    config = get_config("configs/upernet_nano_shapes.yaml")
    (tmp_path / "config.yaml").write_text(config.dump())
    with pytest.raises(InputError, match="is a segmentation network; `replknet segment predict`"):
        get_model(tmp_path)
    assert get_model("configs/upernet_nano_shapes.yaml").out_indices == (0, 1, 2, 3)
