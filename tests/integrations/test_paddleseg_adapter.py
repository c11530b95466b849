"""RepLKNet in PaddleSeg: against a stub of its registry, and trained where a clone is on the
path."""

import inspect

import numpy as np
import paddle
import pytest
from adapters import FOLDER, clone_of, import_with_stubs, is_norm, launch, read_yaml
from PIL import Image
from tiny import FIXTURES

from replknet_paddle.runtime.errors import InputError

YAML = FOLDER / "paddleseg" / "upernet_replknet_31b_ade20k.yml"
WEIGHTS = FIXTURES / "tiny31_official.pth"
EXPECTED = np.load(FIXTURES / "tiny31_expected.npz")


class Registry(dict):
    """Keeps classes and functions by their names, as PaddleSeg's managers do."""

    def add_component(self, component):
        assert inspect.isclass(component) or inspect.isfunction(component)
        self[component.__name__] = component
        return component


@pytest.fixture
def backbone(monkeypatch):
    class manager:
        BACKBONES = Registry()

    import_with_stubs(
        monkeypatch,
        "integrations.paddleseg.replknet",
        {"paddleseg": {}, "paddleseg.cvlibs": {"manager": manager}},
    )
    return manager.BACKBONES["RepLKNet"]


def test_the_yaml_builds_31b(backbone):
    section = read_yaml(YAML)["model"]["backbone"]
    assert section.pop("type") == "RepLKNet"
    network = backbone(in_channels=3, **section)
    assert network.feat_channels == [128, 256, 512, 1024]
    assert network.stages[3].blocks[3].drop_path.rate == 0.5
    assert network.training


def test_it_gives_four_maps_with_the_weights_of_a_classifier(backbone, config_file):
    network = backbone(variant=str(config_file("tiny31")), pretrained=str(WEIGHTS))
    network.eval()
    maps = network(paddle.to_tensor(EXPECTED["images"]))
    assert [m.shape[1] for m in maps] == network.feat_channels == [8, 16, 24, 32]
    for i, values in enumerate(maps):
        np.testing.assert_allclose(values.numpy(), EXPECTED[f"stage{i}"], atol=1e-4)


def test_norms_and_nothing_else_match_the_rule_for_weight_decay(backbone, config_file):
    network = backbone(variant=str(config_file("tiny31")), stage_norms=True)
    rules = read_yaml(YAML)["optimizer"]["custom_cfg"]
    assert [rule["name"] for rule in rules] == ["norm", "bn"]
    for name, parameter in network.named_parameters():
        assert is_norm(name) == (len(parameter.shape) == 1), name


def test_wrong_arguments_are_refused(backbone, config_file):
    with pytest.raises(InputError, match="in_channels is 4"):
        backbone(in_channels=4)
    with pytest.raises(FileNotFoundError, match="replknet_31c"):
        backbone(variant="replknet_31c")
    with pytest.raises(InputError, match="does not fit"):
        backbone(pretrained=str(WEIGHTS))


@pytest.mark.skipif(
    clone_of("paddleseg") is None, reason="no clone of PaddleSeg on the path (PYTHONPATH)"
)
def test_a_clone_of_paddleseg_trains_it(tmp_path, config_file):
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 256, (64, 80, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg")
        Image.fromarray(pixels[..., 0] // 86).save(tmp_path / f"{i}.png")
    (tmp_path / "list.txt").write_text("".join(f"{i}.jpg {i}.png\n" for i in range(4)))
    data = f"""
  type: Dataset
  dataset_root: {tmp_path}
  train_path: {tmp_path}/list.txt
  num_classes: 3
"""
    text = YAML.read_text().replace("[512, 512]", "[64, 64]").replace("[2048, 512]", "[128, 64]")
    text = text.replace("variant: replknet_31b", f"variant: {config_file('tiny31')}")
    text = text.replace("channels: 512", "channels: 16").replace("Null", str(WEIGHTS))
    text = text.replace(
        "\n  type: ADE20K\n  dataset_root: data/ADEChallengeData2016/\n  mode: train\n", data, 1
    )
    text = text.replace("  type: UPerNet", "  num_classes: 3\n  type: UPerNet")
    (tmp_path / "small.yml").write_text(text)
    output = launch(
        clone_of("paddleseg") / "tools" / "train.py",
        *("--config", tmp_path / "small.yml", "--device", "cpu", "--iters", 2, "--log_iters", 1),
        *("--save_dir", tmp_path / "output", "--save_interval", 2),
        cwd=tmp_path,
    )
    losses = [float(part.split(",")[0]) for part in output.split("loss: ")[1:]]
    assert len(losses) == 2 and np.isfinite(losses).all()
    saved = paddle.load(str(tmp_path / "output" / "iter_2" / "model.pdparams"))
    assert "backbone.stages.3.blocks.1.pw_conv_2.conv.weight" in saved
