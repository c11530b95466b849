"""Official segmentation checkpoints: a file that PyTorch wrote goes in and comes back."""

import numpy as np
import paddle
import pytest
from tiny import FIXTURES

from replknet_paddle.checkpoints.files import read_checkpoint, write_safetensors
from replknet_paddle.checkpoints.load import layout_of, load_pretrained
from replknet_paddle.commands import main
from replknet_paddle.config import get_config
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.segmentation.upernet import build_upernet

OFFICIAL = FIXTURES / "upernet_official.pth"

CONFIG = """
MODEL:
  TYPE: UPerNet
  NUM_CLASSES: 5
  OUT_INDICES: [0, 1, 2, 3]
  LARGE_KERNEL_SIZES: [13, 11, 9, 7]
  LAYERS: [1, 1, 2, 1]
  CHANNELS: [8, 16, 24, 32]
  NORM_INTER_FEATURES: True
  DROPPATH: 0.0
TRAIN:
  WARMUP_EPOCHS: 0
SEGMENTATION:
  HEAD_CHANNELS: 12
  AUX_CHANNELS: 6
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "upernet.yaml"
    path.write_text(CONFIG)
    return path


def official_state():
    return read_checkpoint(OFFICIAL)["state_dict"]


def test_outputs_are_those_of_the_official_code_at_odd_sizes(config_file):
    network = build_upernet(get_config(config_file))
    load_pretrained(network, OFFICIAL)
    network.eval()
    expected = np.load(FIXTURES / "upernet_expected.npz")
    images = paddle.to_tensor(expected["images"])
    assert images.shape[2:] == [70, 93]
    with paddle.no_grad():
        logits = network(images).numpy()
        auxiliary = network.auxiliary_head(network.backbone(images)[2]).numpy()
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    np.testing.assert_allclose(auxiliary, expected["auxiliary"], atol=1e-4)


@pytest.mark.parametrize("between", ["native.safetensors", "native.pdparams"])
def test_every_key_goes_in_and_comes_back_bit_for_bit(config_file, tmp_path, between):
    native, back = tmp_path / between, tmp_path / "back.safetensors"
    flags = ["-cfg", str(config_file)]
    assert main(["convert", str(OFFICIAL), str(native), *flags]) == 0
    assert main(["convert", str(native), str(back), "-to", "official", *flags]) == 0
    assert (layout_of(OFFICIAL), layout_of(native), layout_of(back)) == (
        "mmseg",
        "upernet",
        "mmseg",
    )
    before, after = official_state(), read_checkpoint(back)
    assert len(before) == 392 and before.keys() == after.keys()
    for name, value in before.items():
        assert value.shape == after[name].shape, name
        assert value.tobytes() == after[name].tobytes(), name


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("decode_head.fpn_convs.1.bn.running_mean"), "1 missing from the file"),
        (lambda s: s.pop("auxiliary_head.conv_seg.bias"), "auxiliary_head.conv_seg.bias"),
        (lambda s: s.pop("backbone.stages.2.norm.weight"), "backbone.stages.2.norm.weight"),
        (
            lambda s: s.update({"decode_head.psp_modules.4.1.conv.weight": np.zeros(3, "float32")}),
            "1 unexpected in the file",
        ),
        (
            lambda s: s.update({"decode_head.conv_seg.weight": np.zeros((7, 12, 1, 1), "float32")}),
            "1 of another shape",
        ),
    ],
)
def test_a_key_that_is_missing_unknown_or_misshaped_is_an_error(
    config_file, tmp_path, change, message
):
    state = official_state()
    change(state)
    write_safetensors(tmp_path / "changed.safetensors", state, {"format": "pt"})
    network = build_upernet(get_config(config_file))
    before = {name: value.numpy() for name, value in network.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_pretrained(network, tmp_path / "changed.safetensors")
    for name, value in network.state_dict().items():
        assert (value.numpy() == before[name]).all()  # nothing has been loaded


def test_both_classifiers_stay_fresh_for_other_classes_on_demand(config_file, tmp_path):
    config_file.write_text(CONFIG.replace("NUM_CLASSES: 5", "NUM_CLASSES: 9"))
    network = build_upernet(get_config(config_file))
    fresh = network.auxiliary_head.conv_seg.weight.numpy()
    with pytest.raises(InputError, match="of another shape"):
        load_pretrained(network, OFFICIAL)
    load_pretrained(network, OFFICIAL, drop_head=True)
    assert (network.auxiliary_head.conv_seg.weight.numpy() == fresh).all()
    loaded = network.decode_head.bottleneck.conv.weight.numpy()
    assert (loaded == official_state()["decode_head.bottleneck.conv.weight"]).all()


def test_a_classifier_does_not_take_a_segmentation_file(tiny_config_file):
    from replknet_paddle.model import build_replknet

    with pytest.raises(InputError, match="does not fit"):
        load_pretrained(build_replknet(get_config(tiny_config_file)), OFFICIAL)


def test_mmpretrain_has_no_names_for_segmentation(config_file, tmp_path, capsys):
    target = tmp_path / "x.safetensors"
    flags = ["-cfg", str(config_file), "-to", "mmpretrain"]
    assert main(["convert", str(OFFICIAL), str(target), *flags]) == 2
    assert "allowed: native, official" in capsys.readouterr().err and not target.exists()
