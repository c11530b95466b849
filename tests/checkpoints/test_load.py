import pickle
import re

import numpy as np
import paddle
import pytest
from tiny import FIXTURES

from replknet_paddle import zoo
from replknet_paddle.checkpoints.checkpoint_file import record_metadata
from replknet_paddle.checkpoints.files import read_checkpoint, write_pdparams, write_safetensors
from replknet_paddle.checkpoints.load import load_pretrained, load_state
from replknet_paddle.checkpoints.names import LAYOUTS, from_native
from replknet_paddle.runtime.errors import InputError

pytestmark = pytest.mark.paddle_version

REFERENCE_FILES = sorted(path.name for path in FIXTURES.glob("tiny*.p[td]*"))


def reference(name: str) -> dict[str, np.ndarray]:
    """Images and what the reference implementation computes from them: see fixtures' README."""
    return dict(np.load(FIXTURES / f"{name.split('_')[0]}_expected.npz"))


def keys_for(file_name: str) -> dict:
    return {"SMALL_KERNEL_MERGED": True} if "merged" in file_name else {}


@paddle.no_grad()
def logits(model, name: str) -> np.ndarray:
    return model(paddle.to_tensor(reference(name)["images"])).numpy()


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def assert_same_bits(found: dict, wanted: dict) -> None:
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(bits(found[name]), bits(value), err_msg=name)


def random_state(model) -> dict[str, np.ndarray]:
    """Random values under the names and in the shapes of a network's parameters."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(tuple(value.shape)).astype("f4")
        for name, value in model.state_dict().items()
    }


# Reference files


@pytest.mark.parametrize("file_name", REFERENCE_FILES)
def test_reference_file_gives_the_reference_logits(file_name, config_file):
    path = config_file(file_name.split("_")[0], **keys_for(file_name))
    model = zoo.get_model(path, pretrained=FIXTURES / file_name)
    assert not model.training
    tolerance = 2e-2 if "fp16" in file_name else 1e-4
    assert abs(logits(model, file_name) - reference(file_name)["logits"]).max() <= tolerance


def test_moving_average_of_a_training_checkpoint():
    path = FIXTURES / "tiny31_official_train_ckpt.pth"
    plain, average = (load_state(path, weights=weights) for weights in ("model", "model_ema"))
    # The file's average is 1.01 times the model (fixtures' README).
    assert_same_bits(average, {name: value * np.float32(1.01) for name, value in plain.items()})
    assert_same_bits(load_state(path), plain)


@pytest.mark.parametrize("name", ["tiny31", "tinyxl"])
def test_stage_maps_of_a_network_without_head(name, network):
    model = network(name, OUT_INDICES=[0, 1, 2, 3])
    load_pretrained(model, FIXTURES / f"{name}_official.pth")  # final norm and head are left out
    maps = model(paddle.to_tensor(reference(name)["images"]))
    for i, found in enumerate(maps):
        assert abs(found.numpy() - reference(name)[f"stage{i}"]).max() <= 1e-4


# Conversion there and back


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "keys", [{}, {"SMALL_KERNEL_MERGED": True}, {"NUM_CLASSES": 21841}], ids=str
)
@pytest.mark.parametrize("name", ["tiny31", "tinyxl"])
def test_names_there_and_back_bit_for_bit(name, keys, layout, network, tmp_path):
    state = random_state(network(name, **keys))
    path = tmp_path / "converted.safetensors"
    write_safetensors(path, from_native(state, layout), {})
    assert_same_bits(load_state(path), state)


@pytest.mark.parametrize("layout", ["official", "mmpretrain"])
@pytest.mark.parametrize("name", ["tiny31", "tinyxl"])
def test_names_are_those_of_the_reference_files(name, layout):
    """Back from native, a reference file's tensors are what the reference program saved."""
    path = FIXTURES / f"{name}_{layout}.pth"
    original = read_checkpoint(path)
    original = original.get("state_dict", original)
    converted = from_native(load_state(path), layout)
    counts = {key for key in original if key.endswith("num_batches_tracked")}
    assert {key for key in converted if key.endswith("num_batches_tracked")} == counts
    assert_same_bits(
        {key: value for key, value in converted.items() if key not in counts},
        {key: value for key, value in original.items() if key not in counts},
    )


def test_native_names_are_those_of_paddlevit_and_of_the_network(network):
    state = load_state(FIXTURES / "tiny31_paddlevit.pdparams")
    assert sorted(state) == sorted(network("tiny31").state_dict())
    assert_same_bits(load_state(FIXTURES / "tiny31_official.pth"), state)


@pytest.mark.parametrize("layout", ["official", "mmpretrain"])
def test_backbone_with_norms_of_stage_maps(layout, network, tmp_path):
    model = network("tinyxl", OUT_INDICES=[0, 1, 2, 3], NORM_INTER_FEATURES=True)
    state = random_state(model)
    assert "stages.3.norm.weight" in state
    path = tmp_path / "backbone.safetensors"
    write_safetensors(path, from_native(state, layout), {})
    assert_same_bits(load_state(path), state)
    load_pretrained(model, path)
    assert_same_bits({key: value.numpy() for key, value in model.state_dict().items()}, state)


def test_classifier_weights_in_a_backbone_with_fresh_norms(network, caplog):
    model = network("tinyxl", OUT_INDICES=[3], NORM_INTER_FEATURES=True)
    load_pretrained(model, FIXTURES / "tinyxl_official.pth")
    assert "has no norms for the maps" in caplog.text
    assert float(model.stages[3].norm.weight.sum()) == 32


def test_two_final_norms_have_one_mmpretrain_name(network):
    state = random_state(network("tinyxl", NORM_INTER_FEATURES=True))
    with pytest.raises(InputError, match="one place"):
        from_native(state, "mmpretrain")


def test_written_pdparams_load_with_paddle_itself(network, tmp_path):
    path = str(tmp_path / "native.pdparams")
    model = network("tiny31")
    write_pdparams(path, load_state(FIXTURES / "tiny31_official.pth"))
    model.set_state_dict(paddle.load(path))
    assert abs(logits(model, "tiny31") - reference("tiny31")["logits"]).max() <= 1e-4


def test_written_safetensors_are_what_the_library_reads(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file

    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((3, 4)).astype("f4").T,
        "half": np.ones(3, "f2"),
        "count": np.zeros((), np.int64),
        "empty": np.zeros((0, 2), "f4"),
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors, {"format": "pt"})
    assert_same_bits(load_file(path), tensors)
    assert_same_bits(read_checkpoint(path), tensors)
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


# Containers and precision


WRAPPED = {
    "training": lambda state: {"model": state, "model_ema": {}, "optimizer": {}, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "meta": {}},
    "module": lambda state: prefixed("module.", state),
    "module twice": lambda state: {"model": prefixed("module.module.", state)},
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "compiled in module": lambda state: {"model": prefixed("module._orig_mod.", state)},
    "module in compiled": lambda state: prefixed("_orig_mod.module.", state),
    "paddle names": lambda state: {**state, "StructuredToParameterName@@": {"x": "linear_0.w_0"}},
    "profiled": lambda state: {**state, "total_ops": 1, "stages.0.total_params": np.zeros(1)},
    "timm": lambda state: {"epoch": 3, "state_dict": state, "state_dict_ema": {}, "metric": 80.0},
    "mmengine": lambda state: {"state_dict": state, "ema_state_dict": {"steps": np.int64(3)}},
}


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_containers(wrap, network, tmp_path):
    state = random_state(network("tiny31"))
    path = tmp_path / "x.pdparams"
    path.write_bytes(pickle.dumps(wrap(state), protocol=4))
    assert_same_bits(load_state(path), state)


def test_ema_weights_of_timm_and_of_mmengine(network, tmp_path):
    """mmengine exchanges the two when it saves (EMAHook._swap_ema_state_dict): its `state_dict`
    has the average, and `ema_state_dict` what was trained, with the number of updates."""
    trained, average = (random_state(network("tiny31")) for _ in range(2))
    average = {name: value * 2 for name, value in average.items()}
    path = tmp_path / "x.pdparams"
    swapped = {"steps": np.int64(3), **prefixed("module.", trained)}
    for content, default in (
        ({"state_dict": trained, "state_dict_ema": average}, trained),
        ({"state_dict": average, "ema_state_dict": swapped}, average),
    ):
        path.write_bytes(pickle.dumps(content, protocol=4))
        assert_same_bits(load_state(path, weights="model"), trained)
        assert_same_bits(load_state(path, weights="model_ema"), average)
        assert_same_bits(load_state(path), default)


def assert_damaged(path, tensors, metadata) -> None:
    write_safetensors(path, tensors, metadata)
    with pytest.raises(InputError, match="is damaged: its metadata is not what training"):
        load_state(path)


def test_training_checkpoints_of_this_project(network, tmp_path):
    model, average = (random_state(network("tiny31")) for _ in range(2))
    average = {name: value * 2 for name, value in average.items()}
    tensors = {
        **{f"model.{name}": value for name, value in model.items()},
        **{f"model_ema.{name}": value for name, value in average.items()},
        "optimizer.head.weight.moment1": np.zeros(3, "f4"),
    }
    path = tmp_path / "epoch.safetensors"
    write_safetensors(path, tensors, record_metadata({}, tensors))
    assert_same_bits(load_state(path), model)
    assert_same_bits(load_state(path, weights="model_ema"), average)
    for better, wanted in (("model_ema", average), ("model", model)):
        body = {"progress": {"better_weights": better}}
        write_safetensors(path, tensors, record_metadata(body, tensors))
        assert_same_bits(load_state(path), wanted)
        assert_same_bits(load_state(path, weights="model"), model)
    for body in ([], {"progress": []}, {"progress": {"better_weights": []}}):
        assert_damaged(path, tensors, record_metadata(body, tensors))
    for record in ("", "[]", '{"schema_version": 1}', '{"schema_version": 1, "body": "{"}'):
        assert_damaged(path, tensors, {"replknet_paddle": record})
    del tensors["optimizer.head.weight.moment1"]
    tensors = {name: value for name, value in tensors.items() if not name.startswith("model_ema")}
    write_safetensors(path, tensors, record_metadata({}, tensors))
    with pytest.raises(InputError, match="holds no model_ema; it holds model"):
        load_state(path, weights="model_ema")


@pytest.mark.parametrize(
    "narrow, wide",
    [
        (lambda x: x.astype("f2"), lambda x: x.astype("f2").astype("f4")),
        (lambda x: x.astype("f8"), lambda x: x),
        # Paddle's own files hold the bits of bfloat16.
        (
            lambda x: (x.view("u4") >> 16).astype("u2"),
            lambda x: (x.view("u4") >> 16 << 16).view("f4"),
        ),
    ],
    ids=["half", "double", "bfloat16"],
)
def test_other_precisions_become_float32(narrow, wide, network, tmp_path):
    state = random_state(network("tinyxl"))
    path = tmp_path / "x.pdparams"
    path.write_bytes(pickle.dumps({name: narrow(value) for name, value in state.items()}))
    assert_same_bits(load_state(path), {name: wide(value) for name, value in state.items()})


def test_loaded_arrays_are_aligned():
    state = load_state(FIXTURES / "tiny31_official_ddp_fp16_legacy.pth")
    assert all(value.flags.aligned and value.flags.c_contiguous for value in state.values())


# What may differ, and what is left as it was


def test_nothing_is_loaded_from_a_file_that_does_not_fit(network):
    model = network("tiny31")
    before = {name: value.numpy() for name, value in model.state_dict().items()}
    with pytest.raises(InputError):
        load_pretrained(model, FIXTURES / "tinyxl_official.pth")
    assert_same_bits({name: value.numpy() for name, value in model.state_dict().items()}, before)


def test_head_of_other_classes_is_dropped_on_demand(network, caplog):
    model = network("tiny31", NUM_CLASSES=3)
    head = model.head.weight.numpy()
    load_pretrained(model, FIXTURES / "tiny31_official.pth", drop_head=True)
    assert re.search(r"head of .* \(10 classes\) is not loaded.* 3 classes", caplog.text)
    np.testing.assert_array_equal(model.head.weight.numpy(), head)
    np.testing.assert_array_equal(
        model.norm.weight.numpy(), load_state(FIXTURES / "tiny31_official.pth")["norm.weight"]
    )


def test_head_that_fits_is_loaded_even_if_it_may_be_dropped(network):
    model = network("tiny31")
    load_pretrained(model, FIXTURES / "tiny31_official.pth", drop_head=True)
    assert abs(logits(model, "tiny31") - reference("tiny31")["logits"]).max() <= 1e-4
