import argparse
import collections
import io
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
    Made,
    Name,
    Raw,
    Reference,
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

from replknet_paddle.checkpoints.readers import (
    _zip_members,
    read_checkpoint,
    read_safetensors_metadata,
)
from replknet_paddle.checkpoints.unpickle import MappedFile
from replknet_paddle.runtime.errors import InputError

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
ROOT = FIXTURES.parent.parent


@pytest.fixture
def file(tmp_path):
    """Writes bytes to a file and returns its path."""

    def write(data: bytes, name: str = "checkpoint.bin") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def refused(file):
    """Asserts that bytes are refused in one message, which names the file and has given words."""

    def check(data: bytes, *words: str) -> None:
        path = file(data)
        with pytest.raises(InputError) as caught:
            read_checkpoint(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        for word in words:
            assert word in message

    return check


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


def test_format_is_told_by_content_not_by_suffix(file):
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
    ours = {name: bytes(mapped.view(*place)) for name, place in _zip_members(mapped).items()}
    assert ours == theirs


def test_zip64_directory_is_read(file, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 8)  # so that a small archive gets the wide fields
    path = file(every_format()["torch zip"])
    content = read_checkpoint(path)
    np.testing.assert_array_equal(content["model"]["a"], expected()["a"])


# What is refused


def test_missing_file_directory_and_empty_file(tmp_path, refused):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(InputError, match="is not a file"):
        read_checkpoint(tmp_path)
    refused(b"", "empty")


@pytest.mark.parametrize(
    "data, word",
    [
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"hello", "no format that is known"),
        (b"(dp0\n.", "no format that is known"),
    ],
)
def test_other_kinds_of_file_are_named(data, word, refused):
    refused(data, word)


def test_zip_archives_of_other_programs_and_compressed_ones(refused):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("word/document.xml", "x")
    refused(buffer.getvalue(), "not one that PyTorch wrote")
    refused(torch_zip({}, {}, compress=True), "compressed")
    refused(torch_zip({}, {}, byteorder=b"big"), "big-endian")


def test_every_truncation_is_refused(file):
    for data in every_format().values():
        for length in range(1, len(data), 7):
            with pytest.raises(InputError):
                read_checkpoint(file(data[:length]))


BASE = numbers(4, 6)


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**40},
        {"size": (5, 6)},
        {"size": (2**20, 2**20)},
        {"size": (-4, 6)},
        {"size": (4,)},
        {"size": (4.0, 6)},
        {"stride": (6, -1)},
        {"stride": (7, 1)},
        {"stride": (0, 0), "size": (2**31, 2**31)},
        {"stride": (0, 0), "size": (5, 5)},
        {"size": (1,) * 40, "stride": (1,) * 40},
        {"numel": 25},
        {"numel": -1},
        {"numel": 2**62},
        {"key": "absent"},
        {"key": "../../0"},
        {"kind": "FloatStorage"},
        {"size": 24},
        {"kind": Name("torch", "Size")},
        {"kind": Name("torch", "ComplexFloatStorage")},
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_their_storage(changes, refused):
    content = {"x": tensor(BASE, "0", **changes)}
    refused(torch_zip(content, {"0": BASE}))
    refused(torch_legacy(content, {"0": BASE}))


@pytest.mark.parametrize("part", [("k", -1, 3), ("k", 20, 10), ("k", 0, -1), ("k", 2**63, 1), 5])
def test_parts_beyond_a_legacy_storage(part, refused):
    refused(torch_legacy({"x": tensor(BASE, "0", tail=(part,))}, {"0": BASE}))


def test_legacy_headers_that_are_not_ours(refused):
    refused(torch_legacy({}, {}, version=1000), "version or byte order")
    refused(torch_legacy({}, {}, system={"little_endian": False}), "byte order")
    keys_twice = pickled(["0", "0"])
    data = torch_legacy({"x": tensor(BASE, "0")}, {"0": BASE})
    refused(data.replace(pickled(["0"]), keys_twice))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [5, 6]},
        {"shape": [-4, -6]},
        {"shape": [2**40, 2**40]},
        {"dtype": "F8_E4M3"},
        {"shape": "46"},
        {"data_offsets": [0, 92]},
        {"data_offsets": [4, 100]},
        {"dtype": ["F32"]},
        {"data_offsets": [-96, 0]},
        {"data_offsets": [0, 2**62]},
        {"data_offsets": "x"},
        {"shape": [4.0, 6.0]},
        {"shape": None},
    ],
    ids=str,
)
def test_safetensors_headers_that_do_not_fit_the_data(changes, refused):
    refused(safetensors({"x": BASE}, x=changes))


def test_safetensors_with_overlaps_gaps_or_a_tail(refused):
    entry = {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]}
    refused(safetensors({"x": BASE}, y=entry))
    refused(safetensors({"x": BASE}) + b"1234", "header says")
    refused(safetensors({"x": BASE}, {"a": 1}), "metadata")
    refused((2**20).to_bytes(8, "little") + b"{" + b"[" * 2**20)


EMPTY_ARRAY = Call(
    Name("numpy.core.multiarray", "_reconstruct"), (Name("numpy", "ndarray"), (0,), b"b")
)


def array_of(dtype, shape, data, state=(3, "<", None, None, None, -1, -1, 0)):
    """A numpy array as it is pickled: first made, then filled."""
    kind = Raw(encode(Call(Name("numpy", "dtype"), (dtype, False, True))) + encode(state) + b"b")
    return Raw(encode(EMPTY_ARRAY) + encode((1, shape, kind, False, data)) + b"b")


def test_numpy_array_made_by_hand_is_read(file):
    found = read_checkpoint(file(pickled({"x": array_of("f4", (4, 6), BASE.tobytes())})))
    np.testing.assert_array_equal(found["x"], BASE)


@pytest.mark.parametrize(
    "array",
    [
        array_of("O8", (1,), [1]),
        array_of("O", (1,), b"12345678"),
        array_of("V8", (1,), b"12345678"),
        array_of("S8", (1,), b"12345678"),
        array_of("f4", (2**40,), b"1234"),
        array_of("f4", (-1,), b"1234"),
        array_of("f4", (2,), b"1234"),
        array_of("f4", (1,), [1.0]),
        array_of("f4", [1], b"1234"),
        array_of("f4", (0, 2**70), b""),
        array_of("f4", (1,), b"1234", (3, ">", None, None, None, -1, -1, 0)),
        array_of("f4", (1,), b"1234", (3, "|", None, ("a",), {"a": 1}, 8, 1, 16)),
        array_of(("f4", 4), (1,), b"1234"),
        array_of("(2)f4", (1,), b"12345678"),
        array_of("f4,i4", (1,), b"12345678"),
        array_of("M8[s]", (1,), b"12345678"),
    ],
    ids=repr,
)
def test_numpy_types_and_shapes_that_are_not_plain_numbers(array, refused):
    refused(pickled({"x": array}))


def test_numpy_array_that_never_gets_content(refused):
    refused(pickled({"x": EMPTY_ARRAY}), "before its content")
    refused(pickled([EMPTY_ARRAY, EMPTY_ARRAY]), "before its content")


def nested_tuples(depth: int) -> Raw:
    """A tuple that holds the one before it twice: hashing or printing takes 2**depth steps."""
    return Raw(b")" + b"q\x00h\x00\x86" * depth)


@pytest.mark.parametrize(
    "data",
    [
        pickled(
            {"x": Raw(b"r\xff\xff\xff\xff")}
        ),  # a memo index: without a bound 32 GB in C pickle
        b"\x80\x02]r\xff\xff\xff\x7f.x",
        b"\x80\x02X\xff\xff\xff\xffabc.",  # text of 4 GB
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fabc.",  # bytes of 8 EB
        b"\x80\x04\x96" + b"\x00" * 6 + b"\x01\x00abc.",
        b"\x80\x02\x8b\xff\xff\xff\x7f1.",  # an integer of 2 GB
        b"\x80\x02T\xff\xff\xff\xffabc.",  # a negative length
        b"\x80\x02}" + nested_tuples(100) + b"Ns.",  # as a key
        pickled(array_of(nested_tuples(100), (1,), b"1")),  # in error messages
        pickled(array_of("f4", nested_tuples(100), b"1")),
        pickled(Call(Name("_codecs", "encode"), ("x", nested_tuples(100)))),
        torch_zip({"x": tensor(BASE, "0", size=nested_tuples(100))}, {"0": BASE}),
        torch_zip({"x": tensor(BASE, "0", offset=nested_tuples(100))}, {"0": BASE}),
        torch_zip({"x": tensor(BASE, "0", key=nested_tuples(100))}, {"0": BASE}),
        torch_zip({"x": Reference(nested_tuples(100))}, {}),
        pickled(Raw(nested_tuples(100) + encode("x") + b"\x93")),
        pickled(Raw(encode("x") + nested_tuples(100) + b"\x93")),
        pickled(
            {"UnpackBigParamInfor@@": {"w": {"OriginShape": (1,), "slices": [nested_tuples(100)]}}}
        ),
        torch_legacy({}, {})[: -len(pickled([]))] + pickled([nested_tuples(100)]),
        pickled(array_of("f4", (2**2000,) * 32, b"1")),
        b"\x80\x02}(](K\x01e" + b"K\x01u.",  # a list as a key
        b"\x80\x02h\x05.",  # an entry that the memo does not have
        b"\x80\x020.",
        b"\x80\x02.",
        b"\x80\x02u.",
        b"\x80\x02]K\x01a",
        b"\x80\x02)K\x01a.",
        b"\x80\x02}K\x01b.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02\x97.",
        b"\x80\x02K\x05)R.",
        b"\x80\x02N)R.",
        b"\x80\x02U\x01x)\x81.",
        pickled(Reference("x")),
        b"\x80\x02I1\n.",
    ],
    ids=lambda data: "",
)
def test_hostile_opcodes_are_refused_at_once(data, refused):
    refused(data)


def test_deep_nesting_and_cycles_do_not_recurse(file):
    deep = read_checkpoint(file(b"\x80\x02" + b"](" * 2000 + b"e" * 2000 + b"."))
    for _ in range(1999):
        (deep,) = deep
    cycle = read_checkpoint(file(b"\x80\x02]q\x00h\x00a."))
    assert cycle[0] is cycle


def repeated(opcodes: bytes, count: int) -> bytes:
    return b"\x80\x02](" + opcodes * count + b"e."


@pytest.mark.parametrize(
    "data",
    [
        repeated(b"\x8f", 300_000),  # empty sets, 216 bytes for each byte of the file
        repeated(b"}", 300_000),
        b"\x80\x02X"
        + (3000).to_bytes(4, "little")
        + b"x" * 3000
        + b"q\x000c_codecs\nencode\nq\x010"
        + repeated(b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R", 20_000)[2:],  # one text, copied
        b"\x80\x02]("
        + b"K\x01" * 5000
        + b"eq\x000c__builtin__\nset\nq\x010"
        + repeated(b"h\x01h\x00\x85R", 2_000)[2:],  # one list, copied
    ],
    ids=["sets", "dicts", "texts", "copies"],
)
def test_small_files_cannot_become_large_objects(data, refused):
    refused(data, "more than twice")


def test_one_storage_under_many_names_is_bounded(refused):
    base = numbers(2**20)
    content = [tensor(base, "0") for _ in range(20)]
    refused(torch_zip(content, {"0": base}), "more than twice")


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


def test_made_object_with_a_state_that_is_not_attributes(refused):
    refused(pickled(Made(Name("argparse", "Namespace"), [1])), "state")
