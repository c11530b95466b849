"""RepLKNet in PaddleSeg: against a stub of its registry, and trained where a clone is on the
path."""

import inspect
import re

import numpy as np
import paddle
import pytest
import yaml
from adapters import FOLDER, clone_of, import_with_stubs, is_norm, launch, read_yaml
from PIL import Image
from tiny import FIXTURES

from replknet_paddle.checkpoints.files import read_checkpoint
from replknet_paddle.checkpoints.load import load_state
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
    assert section.pop("pretrained") is True
    network = backbone(in_channels=3, **section)
    assert network.feat_channels == [128, 256, 512, 1024]
    assert network.stages[3].blocks[3].drop_path.rate == 0.5


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
    with pytest.raises(InputError, match="replknet-31c is not a published model"):
        backbone(variant="replknet-31c")
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
    tree = read_yaml(YAML)
    for split in ("train", "val"):
        dataset = tree[f"{split}_dataset"]
        dataset |= {"type": "Dataset", "dataset_root": str(tmp_path), "num_classes": 3}
        dataset[f"{split}_path"] = str(tmp_path / "list.txt")
        for transform in dataset["transforms"]:
            if transform["type"] == "Resize":
                transform["target_size"] = [128, 64]
            if transform["type"] == "RandomPaddingCrop":
                transform["crop_size"] = [64, 64]
    tree["model"] |= {"num_classes": 3, "channels": 16, "aux_channels": 8}
    backbone = {"variant": str(config_file("tiny31")), "pretrained": str(WEIGHTS)}
    tree["model"]["backbone"] |= backbone
    (tmp_path / "small.yml").write_text(yaml.safe_dump(tree))
    output = launch(
        clone_of("paddleseg") / "tools" / "train.py",
        *("--config", tmp_path / "small.yml", "--device", "cpu", "--iters", 2, "--log_iters", 1),
        *("--save_dir", tmp_path / "output", "--save_interval", 2),
        cwd=tmp_path,
    )
    losses = [float(loss) for loss in re.findall(r", loss: (\S+?),", output)]
    assert len(losses) == 2 and np.isfinite(losses).all()
    saved = read_checkpoint(tmp_path / "output" / "iter_2" / "model.pdparams")
    name = "stem.0.conv.weight"  # no stochastic depth leaves it without a gradient
    before, after = load_state(WEIGHTS)[name], saved[f"backbone.{name}"]
    assert 0 < abs(after - before).max() < 1e-3  # trained from what was loaded
