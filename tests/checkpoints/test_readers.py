import argparse
import collections
import math
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from handmade import (
    TORCH_MAGIC,
    Call,
    Name,
    Raw,
    encode,
    every_format,
    expected,
    numbers,
    pickled,
    safetensors,
    tensor,
    torch_legacy,
    torch_zip,
)

from replknet_paddle.checkpoints.mapped_file import MappedFile
from replknet_paddle.checkpoints.readers import read_checkpoint, read_safetensors_metadata
from replknet_paddle.checkpoints.torch_files import zip_members
from replknet_paddle.runtime.errors import InputError

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
ROOT = FIXTURES.parent.parent


@pytest.mark.parametrize("name", every_format())
def test_every_format_gives_the_same_arrays(name, file):
    content = read_checkpoint(file(every_format()[name]))
    if name == "safetensors":
        model = {key.removeprefix("model."): value for key, value in content.items()}
    else:
        assert content["epoch"] == 7
        model = content["model"]
    assert list(model) == list(expected())
    for key, value in expected().items():
        assert model[key].dtype == value.dtype
        np.testing.assert_array_equal(model[key], value)


def test_format_is_reported_by_content_not_by_suffix(file):
    for data in every_format().values():
        assert read_checkpoint(file(data, "weights.txt"))


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.glob("tiny*.p[td]*")))
def test_reference_files_of_real_programs_are_read(name):
    content = read_checkpoint(FIXTURES / name)
    state = content.get("state_dict", content.get("model", content))
    arrays = [
        value
        for name, value in state.items()
        if name.rpartition(".")[2] not in ("num_batches_tracked", "StructuredToParameterName@@")
    ]
    assert len(arrays) >= 200
    assert all(np.isfinite(array).all() for array in arrays)
    assert {array.dtype for array in arrays} == {np.dtype("f2" if "fp16" in name else "f4")}


def test_training_checkpoint_extras_are_plain_data():
    content = read_checkpoint(FIXTURES / "tiny31_official_train_ckpt.pth")
    assert content["epoch"] == 7
    assert isinstance(content["args"], dict) and content["args"]
    assert content["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    for name, value in content["model"].items():
        if value.dtype.kind == "f":
            np.testing.assert_array_equal(content["model_ema"][name], value * np.float32(1.01))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_harmless_python_objects_become_plain_data(protocol, file):
    data = {
        "args": argparse.Namespace(lr=0.1, names=["a"]),
        "ordered": collections.OrderedDict(x=1),
        "counter": collections.Counter({4: 2}),
        "default": collections.defaultdict(list, {"k": [1]}),
        "scalar": np.float64(2.5),
        "count": np.int32(3),
        "set": {1, 2},
        "frozen": frozenset({3}),
        "nothing": None,
        "big": 2**70,
        "bytes": b"\x00\xff",
        "empty": b"",
        "nested": [(1, ("x", 2.5)), True],
        "text": "é" * 5000,
        "type": list,
        "none": np.zeros((0, 3), "f4"),
        "fortran": np.asfortranarray(numbers(3, 4)),
        "scalar_array": np.array(1.5),
    }
    content = read_checkpoint(file(pickle.dumps(data, protocol=protocol)))
    assert content["args"] == {"lr": 0.1, "names": ["a"]}
    assert content["ordered"] == {"x": 1} and content["counter"] == {4: 2}
    assert content["default"] == {"k": [1]}
    assert content["scalar"] == 2.5 and type(content["scalar"]) is float
    assert content["count"] == 3 and type(content["count"]) is int
    assert content["type"].split(".")[1] == "list"
    for name in ("set", "frozen", "nothing", "big", "bytes", "empty", "nested", "text"):
        assert content[name] == data[name]
    for name in ("none", "fortran", "scalar_array"):
        np.testing.assert_array_equal(content[name], data[name])


def test_bytes_disguised_as_text_may_share_the_memo_with_text(file):
    """Python has one string for each single character, so a pickler refers to the first use."""
    encoded = b"c_codecs\nencode\n" + encode("b") + b"q\x01" + encode("latin1") + b"\x86R"
    assert read_checkpoint(file(b"\x80\x02](" + encoded + b"h\x01e.")) == [b"b", "b"]


def test_array_mentioned_twice_is_one_array(file):
    shared = numbers(3)
    content = read_checkpoint(file(pickle.dumps({"one": shared, "two": shared}, protocol=4)))
    assert content["one"] is content["two"]
    np.testing.assert_array_equal(content["two"], shared)


def test_bfloat16_is_widened_to_float32(file):
    values = np.float32([1.5, -2.0, math.pi])
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    wanted = (bits.astype(np.uint32) << 16).view(np.float32)
    content = {"x": tensor(bits, "0"), "y": tensor(bits[1:], "0", numel=3, offset=1)}
    for data in (torch_zip(content, {"0": bits}), torch_legacy(content, {"0": bits})):
        found = read_checkpoint(file(data))
        np.testing.assert_array_equal(found["x"], wanted)
        np.testing.assert_array_equal(found["y"], wanted[1:])
    np.testing.assert_array_equal(read_checkpoint(file(safetensors({"x": bits})))["x"], wanted)


def test_views_of_one_torch_storage(file):
    base = numbers(4, 6)
    content = {
        "transposed": tensor(base.T, "0"),
        "column": tensor(base[:, 2], "0", numel=24, offset=2),
        "parameter": Call(
            Name("torch._utils", "_rebuild_parameter"), (tensor(base, "0"), True, {})
        ),
        "empty": tensor(base[:0], "0", numel=24),
        "scalar": tensor(base[0, 0], "0", numel=24, stride=()),
    }
    for data in (torch_zip(content, {"0": base}), torch_legacy(content, {"0": base})):
        found = read_checkpoint(file(data))
        np.testing.assert_array_equal(found["transposed"], base.T)
        np.testing.assert_array_equal(found["column"], base[:, 2])
        np.testing.assert_array_equal(found["parameter"], base)
        assert found["empty"].shape == (0, 6) and found["scalar"].shape == ()


def test_part_of_a_legacy_storage(file):
    base = numbers(10)
    content = {"part": tensor(base[:3], "0", numel=10, tail=(("0_4", 4, 3),))}
    found = read_checkpoint(file(torch_legacy(content, {"0": base})))
    np.testing.assert_array_equal(found["part"], base[4:7])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_legacy_file_in_every_pickle_protocol(protocol, file):
    data = every_format()["torch legacy"].removeprefix(pickled(TORCH_MAGIC))
    found = read_checkpoint(file(pickle.dumps(TORCH_MAGIC, protocol=protocol) + data))
    np.testing.assert_array_equal(found["model"]["a"], expected()["a"])


def test_torch_constants_are_text(file):
    content = {
        "dtype": Name("torch", "float16"),
        "size": Call(Name("torch", "Size"), ((2, 3),)),
        "device": Call(Name("torch", "device"), ("cuda", 1)),
    }
    found = read_checkpoint(file(torch_zip(content, {})))
    assert found == {"dtype": "torch.float16", "size": (2, 3), "device": "cuda:1"}


def test_paddle_tensors_in_both_pickled_forms(file):
    array = numbers(2, 2)
    encoded = Raw(pickle.dumps(array, protocol=2)[2:-1])
    named = Call(Name("__builtin__", "tuple"), (("linear_0.w_0", encoded),))
    dense = Call(Name("__builtin__", "eval"), ("data", {"data": encoded}))
    found = read_checkpoint(
        file(
            pickled({"named": named, "dense": dense, "StructuredToParameterName@@": {"named": "w"}})
        )
    )
    np.testing.assert_array_equal(found["named"], array)
    np.testing.assert_array_equal(found["dense"], array)


def test_paddle_files_of_the_installed_paddle(tmp_path):
    import paddle

    layer = paddle.nn.Linear(3, 2)
    for protocol in (2, 3, 4):
        path = str(tmp_path / f"{protocol}.pdparams")
        paddle.save(layer.state_dict(), path, protocol=protocol)
        found = read_checkpoint(path)
        np.testing.assert_array_equal(found["weight"], layer.weight.numpy())
        paddle.save({"model": layer.state_dict(), "list": [layer.bias]}, path, protocol=protocol)
        found = read_checkpoint(path)
        np.testing.assert_array_equal(found["model"]["weight"], layer.weight.numpy())
        np.testing.assert_array_equal(found["list"][0], layer.bias.numpy())


def test_arrays_that_paddle_split_are_joined(file):
    array = numbers(4, 5)
    flat = array.reshape(-1)
    data = {
        "w@@.0": flat[:7],
        "w@@.1": flat[7:14],
        "w@@.2": flat[14:],
        "other": flat,
        "UnpackBigParamInfor@@": {
            "w": {"OriginShape": (4, 5), "slices": ["w@@.0", "w@@.1", "w@@.2"]}
        },
    }
    found = read_checkpoint(file(pickle.dumps(data, protocol=2)))
    assert sorted(found) == ["other", "w"]
    np.testing.assert_array_equal(found["w"], array)


def test_safetensors_metadata(file):
    path = file(safetensors({"x": numbers(2)}, {"format": "pt", "note": "hello"}))
    assert read_safetensors_metadata(path) == {"format": "pt", "note": "hello"}
    assert read_safetensors_metadata(file(safetensors({"x": numbers(2)}))) == {}
    with pytest.raises(InputError, match="not a safetensors file"):
        read_safetensors_metadata(file(pickle.dumps({}, protocol=4)))


def test_zip_directory_is_read_as_the_standard_library_reads_it():
    path = FIXTURES / "tiny31_official.pth"
    with zipfile.ZipFile(path) as archive:
        theirs = {name: archive.read(name) for name in archive.namelist()}
    mapped = MappedFile(path)
    ours = {name: bytes(mapped.view(*place)) for name, place in zip_members(mapped).items()}
    assert ours == theirs


def test_zip64_directory_is_read(file, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 8)  # so that a small archive gets the wide fields
    path = file(every_format()["torch zip"])
    content = read_checkpoint(path)
    np.testing.assert_array_equal(content["model"]["a"], expected()["a"])


PEAK = """
import resource, sys
import numpy as np
from replknet_paddle.checkpoints.readers import read_checkpoint

def resident(field):
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

before = resident('VmRSS')
content = read_checkpoint(sys.argv[1])
total = sum(float(value.sum(dtype='f8')) for value in content.values())
print(resident('VmHWM') - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads peak memory from /proc")
@pytest.mark.parametrize(
    "kind", ["torch zip", "torch legacy", "paddle 2", "paddle 4", "safetensors"]
)
def test_peak_memory_is_at_most_1_3_times_the_file(kind, file):
    rng = np.random.default_rng(0)
    arrays = {str(i): rng.standard_normal(2**19).astype("f4") for i in range(32)}  # 64 MiB
    if kind.startswith("torch"):
        content = {key: tensor(array, key) for key, array in arrays.items()}
        data = (torch_zip if kind == "torch zip" else torch_legacy)(content, arrays)
    elif kind == "safetensors":
        data = safetensors(arrays)
    else:
        data = pickle.dumps(arrays, protocol=int(kind[-1]))
    path = file(data)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    assert int(done.stdout) <= 1.3 * len(data)
