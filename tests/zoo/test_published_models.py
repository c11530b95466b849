import importlib.util
import re
from pathlib import Path

import numpy as np
import paddle
import pytest
from shapes_only import without_values

from replknet_paddle.analysis.costs import count_macs, count_parameters
from replknet_paddle.config import get_config
from replknet_paddle.model import build_replknet
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.zoo import find_record, get_model, list_models
from replknet_paddle.zoo.records import MODELS

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
CONFIGS = FIXTURES.parent.parent / "configs"

MMPRETRAIN_NAMES = [
    "replknet-31B_3rdparty_in1k",
    "replknet-31B_3rdparty_in1k-384px",
    "replknet-31B_in21k-pre_3rdparty_in1k",
    "replknet-31B_in21k-pre_3rdparty_in1k-384px",
    "replknet-31L_in21k-pre_3rdparty_in1k-384px",
    "replknet-XL_meg73m-pre_3rdparty_in1k-320px",
]


def test_list_of_all_models():
    assert list_models() == [
        "replknet-31b-1k-224",
        "replknet-31b-1k-384",
        "replknet-31b-22k1k-224",
        "replknet-31b-22k1k-384",
        "replknet-31l-22k1k-384",
        "replknet-xl-73m1k-320",
        "replknet-31b-22k",
        "replknet-31l-22k",
    ]


@pytest.mark.parametrize(
    "pattern, count",
    [("*384*", 3), ("*31L*", 2), ("replknet-31b-1k-224", 1), ("*in21k-pre*", 3), ("resnet*", 0)],
)
def test_list_by_pattern(pattern, count):
    assert len(list_models(pattern)) == count


def test_names_of_mmpretrain_are_known():
    assert [model.alias for model in MODELS if model.alias] == MMPRETRAIN_NAMES
    for name in MMPRETRAIN_NAMES:
        assert find_record(name).alias == name
    assert find_record("RepLKNet-31B-1K-224").name == "replknet-31b-1k-224"


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="replknet-50 is not.*replknet-31b-1k-224, "):
        get_model("replknet-50")


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_record_agrees_with_its_config(model):
    config = get_config(str(CONFIGS / model.config))
    assert config.DATA.IMAGE_SIZE == model.image_size
    assert config.MODEL.NUM_CLASSES == model.num_classes
    if model.url:
        assert re.fullmatch("[0-9a-f]{8}", model.sha256_start)
        assert model.url.endswith(f"_20221118-{model.sha256_start}.pth")
    assert model.licence in ("MIT", "Apache-2.0")


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_record_has_the_network_s_number_of_parameters(model):
    with paddle.LazyGuard():  # XL would take 1.3 GB
        network = build_replknet(get_config(str(CONFIGS / model.config)))
    assert count_parameters(network) == model.parameters


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_record_has_the_network_s_multiply_adds(model):
    config = get_config(str(CONFIGS / model.config))
    config.defrost()
    config.MODEL.SMALL_KERNEL_MERGED = True
    network = without_values(build_replknet, config)
    assert count_macs(network, model.image_size) == model.multiply_adds


def test_model_of_a_yaml_file_and_of_a_configuration(config_file):
    path = config_file("tiny31")
    images = paddle.to_tensor(np.load(FIXTURES / "tiny31_expected.npz")["images"])
    for what in (path, str(path), get_config(str(path))):
        model = get_model(what, pretrained=FIXTURES / "tiny31_paddlevit.pdparams")
        expected = np.load(FIXTURES / "tiny31_expected.npz")["logits"]
        assert abs(model(images).numpy() - expected).max() <= 1e-4
    with pytest.raises(InputError, match="no weights: MODEL.PRETRAINED is None; name a checkpoint"):
        get_model(path, pretrained=True)


def test_moving_average_by_get_model(config_file):
    path = FIXTURES / "tiny31_official_train_ckpt.pth"
    plain, average = (
        get_model(config_file("tiny31"), pretrained=path, weights=weights)
        for weights in ("model", "model_ema")
    )
    np.testing.assert_array_equal(
        average.head.bias.numpy(), plain.head.bias.numpy() * np.float32(1.01)
    )


def test_missing_file(config_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        get_model(config_file("tiny31"), pretrained=tmp_path / "absent.pth")


def test_documents_have_the_tables_that_the_records_give(capsys):
    path = FIXTURES.parent.parent / "docs" / "zoo_tables.py"
    spec = importlib.util.spec_from_file_location("zoo_tables", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main(["--check"]) == 0, capsys.readouterr().err
