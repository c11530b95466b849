"""Files of all formats are read as plain data; damaged and hostile ones are refused.

An audit hook watches the interpreter itself, so that "nothing ran" means no import, no execution of
code, no process, no file opened for writing, whatever the attack would have done with it.
"""

import argparse
import collections
import io
import math
import os
import pickle
import sys
import tracemalloc
import zipfile
from pathlib import Path

import handmade as made
import numpy as np
import pytest
from handmade import (
    Call,
    Made,
    Name,
    Raw,
    Reference,
    call,
    encode,
    numbers,
    opcodes,
    pickled,
    tensor,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import FIXTURES

from replknet_paddle.checkpoints import pickles
from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile
from replknet_paddle.checkpoints.files import read_checkpoint
from replknet_paddle.runtime.errors import InputError

BASE = numbers(4, 6)


@pytest.fixture
def file(tmp_path):
    """Writes bytes to a file and returns its path."""

    def write(data: bytes, name: str = "checkpoint.bin") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def refusal(path: Path) -> str:
    """The message of a file that is refused, which names it."""
    with pytest.raises(InputError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


# ---- what is read


@pytest.mark.parametrize("name", made.every_format())
def test_every_format_gives_the_same_arrays_whatever_its_suffix(name, file):
    content = read_checkpoint(file(made.every_format()[name], "weights.txt"))
    if name == "safetensors":
        model = {key.removeprefix("model."): value for key, value in content.items()}
    else:
        assert content["epoch"] == 7
        model = content["model"]
    assert list(model) == list(made.expected())
    for key, value in made.expected().items():
        assert model[key].dtype == value.dtype
        np.testing.assert_array_equal(model[key], value)


def test_a_training_checkpoint_of_torch_is_plain_data():
    """Its weights, and those of all other reference files, are compared in test_load.py."""
    content = read_checkpoint(FIXTURES / "tiny31_official_train_ckpt.pth")
    assert content["epoch"] == 7
    assert isinstance(content["args"], dict) and content["args"]
    assert content["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_harmless_python_objects_become_plain_data(protocol, file):
    shared = numbers(3)
    same = {
        "set": {1, 2},
        "frozen": frozenset({3}),
        "nothing": None,
        "big": 2**70,
        "bytes": b"\x00\xff",
        "empty": b"",
        "nested": [(1, ("x", 2.5)), True],
        "text": "é" * 5000,
        "none": np.zeros((0, 3), "f4"),
        "fortran": np.asfortranarray(numbers(3, 4)),
        "scalar_array": np.array(1.5),
        "one": shared,
        "two": shared,
    }
    made_plain = {
        "args": (argparse.Namespace(lr=0.1, names=["a"]), {"lr": 0.1, "names": ["a"]}),
        "ordered": (collections.OrderedDict(x=1), {"x": 1}),
        "counter": (collections.Counter({4: 2}), {4: 2}),
        "default": (collections.defaultdict(list, {"k": [1]}), {"k": [1]}),
        "scalar": (np.float64(2.5), 2.5),
        "count": (np.int32(3), 3),
    }
    data = same | {name: before for name, (before, _) in made_plain.items()} | {"type": list}
    content = read_checkpoint(file(pickle.dumps(data, protocol=protocol)))
    for name, value in (same | {name: after for name, (_, after) in made_plain.items()}).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(content[name], value)
        else:
            assert content[name] == value
    assert type(content["scalar"]) is float and type(content["count"]) is int
    assert content["type"].split(".")[1] == "list"
    assert content["one"] is content["two"]


def test_bytes_disguised_as_text_may_share_the_memo_with_text(file):
    """Python has one string for each single character, so a pickler refers to the first use."""
    encoded = b"c_codecs\nencode\n" + encode("b") + b"q\x01" + encode("latin1") + b"\x86R"
    assert read_checkpoint(file(b"\x80\x02](" + encoded + b"h\x01e.")) == [b"b", "b"]


def test_bfloat16_is_widened_to_float32(file):
    values = np.float32([1.5, -2.0, math.pi])
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    wanted = (bits.astype(np.uint32) << 16).view(np.float32)
    content = {"x": tensor(bits, "0"), "y": tensor(bits[1:], "0", numel=3, offset=1)}
    for write in (made.torch_zip, made.torch_legacy):
        found = read_checkpoint(file(write(content, {"0": bits})))
        np.testing.assert_array_equal(found["x"], wanted)
        np.testing.assert_array_equal(found["y"], wanted[1:])
    found = read_checkpoint(file(made.safetensors({"x": bits})))
    np.testing.assert_array_equal(found["x"], wanted)


@pytest.mark.parametrize("write", [made.torch_zip, made.torch_legacy])
def test_views_of_one_torch_storage(write, file):
    content = {
        "transposed": tensor(BASE.T, "0"),
        "column": tensor(BASE[:, 2], "0", numel=24, offset=2),
        "parameter": call("torch._utils._rebuild_parameter", tensor(BASE, "0"), True, {}),
        "empty": tensor(BASE[:0], "0", numel=24),
        "scalar": tensor(BASE[0, 0], "0", numel=24, stride=()),
        "dtype": Name("torch", "float16"),
        "size": call("torch.Size", (2, 3)),
        "device": call("torch.device", "cuda", 1),
    }
    found = read_checkpoint(file(write(content, {"0": BASE})))
    np.testing.assert_array_equal(found["transposed"], BASE.T)
    np.testing.assert_array_equal(found["column"], BASE[:, 2])
    np.testing.assert_array_equal(found["parameter"], BASE)
    assert found["empty"].shape == (0, 6) and found["scalar"].shape == ()
    assert [found[name] for name in ("dtype", "size", "device")] == [
        "torch.float16",
        (2, 3),
        "cuda:1",
    ]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_legacy_file_in_every_pickle_protocol(protocol, file):
    data = made.every_format()["torch legacy"].removeprefix(pickled(made.TORCH_MAGIC))
    found = read_checkpoint(file(pickle.dumps(made.TORCH_MAGIC, protocol=protocol) + data))
    np.testing.assert_array_equal(found["model"]["a"], made.expected()["a"])


def test_paddle_tensors_in_both_pickled_forms(file):
    encoded = Raw(pickle.dumps(BASE, protocol=2)[2:-1])
    content = {
        "named": Call(Name("__builtin__", "tuple"), (("linear_0.w_0", encoded),)),
        "dense": Call(Name("__builtin__", "eval"), ("data", {"data": encoded})),
        "by hand": array_of("f4", (4, 6), BASE.tobytes()),
    }
    found = read_checkpoint(file(pickled(content)))
    for name in content:
        np.testing.assert_array_equal(found[name], BASE)


def test_paddle_files_of_the_installed_paddle(tmp_path):
    import paddle

    layer = paddle.nn.Linear(3, 2)
    for protocol in (2, 3, 4):
        path = str(tmp_path / f"{protocol}.pdparams")
        content = {"model": layer.state_dict(), "list": [layer.bias], **layer.state_dict()}
        paddle.save(content, path, protocol=protocol)
        found = read_checkpoint(path)
        np.testing.assert_array_equal(found["weight"], layer.weight.numpy())
        np.testing.assert_array_equal(found["model"]["weight"], layer.weight.numpy())
        np.testing.assert_array_equal(found["list"][0], layer.bias.numpy())


def test_metadata_of_safetensors(file):
    path = file(made.safetensors({"x": BASE}, {"format": "pt", "note": "hello"}))
    assert CheckpointFile(path).metadata == {"format": "pt", "note": "hello"}
    assert CheckpointFile(file(made.safetensors({"x": BASE}))).metadata == {}
    assert CheckpointFile(file(pickle.dumps({}, protocol=4))).metadata == {}


def test_zip64_directory_is_read(file, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 8)  # so that a small archive gets the wide fields
    content = read_checkpoint(file(made.every_format()["torch zip"]))
    np.testing.assert_array_equal(content["model"]["a"], made.expected()["a"])


def peak_bytes(path: Path) -> int:
    """The memory that reading a file takes, besides the map of the file."""
    tracemalloc.start()
    try:
        read_checkpoint(path)
    except InputError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    "kind", ["torch zip", "torch legacy", "paddle 2", "paddle 4", "safetensors"]
)
def test_peak_memory_is_at_most_1_5_times_the_file(kind, file):
    rng = np.random.default_rng(0)
    arrays = {str(i): rng.standard_normal(2**19).astype("f4") for i in range(16)}  # 32 MiB
    if kind.startswith("torch"):
        content = {key: tensor(array, key) for key, array in arrays.items()}
        data = (made.torch_zip if kind == "torch zip" else made.torch_legacy)(content, arrays)
    elif kind == "safetensors":
        data = made.safetensors(arrays)
    else:
        data = pickle.dumps(arrays, protocol=int(kind[-1]))
    mapped = 0 if kind.startswith("paddle") else len(data)
    assert mapped + peak_bytes(file(data)) <= 1.5 * len(data)


# ---- what is refused


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_checkpoint(tmp_path / "absent.pth")
    assert "is not a file" in refusal(tmp_path)


def other_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("word/document.xml", "x")
    return buffer.getvalue()


SHARED_ENTRY = {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]}

# Files of other kinds, and of versions that are not read -> what the message says.
OTHERS = {
    b"": "empty",
    b"<!DOCTYPE html><html>": "web page",
    b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
    b"\x1f\x8b\x08\x00": "gzip",
    b"hello": "no format that is known",
    b"(dp0\n.": "no format that is known",
    b"\x80": "no format that is known",
    pickled({}) + b"1234": "4 bytes after its end",
    other_zip(): "not one that PyTorch wrote",
    made.torch_zip({}, {}, compress=True): "compressed",
    made.torch_zip({}, {}, byteorder=b"big"): "big-endian",
    made.torch_legacy({}, {}, version=1000): "version or byte order",
    made.torch_legacy({}, {}, system={"little_endian": False}): "byte order",
    made.torch_legacy({"x": tensor(BASE, "0")}, {"0": BASE}).replace(
        pickled(["0"]), pickled(["0", "0"])
    ): "ends too early",
    made.safetensors({"x": BASE}, y=SHARED_ENTRY): "overlaps",
    made.safetensors({"x": BASE}) + b"1234": "belong to no tensor",
    made.safetensors({"x": BASE}, {"a": 1}): "metadata that are not texts",
    made.safetensors({"x": BASE}).replace(b'"shape"', b'"dtype"'): "twice",
    (2**20).to_bytes(8, "little") + b"{" + b"[" * 2**20: "damaged",
}


@pytest.mark.parametrize("data", OTHERS, ids=lambda data: OTHERS[data])
def test_other_kinds_of_file_are_named(data, file):
    assert OTHERS[data] in refusal(file(data))


SIZES = st.sampled_from([0, 1, 2, 3, 4, 6, -1, 2**20, 2**31, 2**62, 4.0, None])


@settings(max_examples=300, deadline=None)
@given(
    offset=st.sampled_from([0, 1, 7, 23, 24, -1, 2**40]),
    size=st.lists(SIZES, max_size=3).map(tuple),
    stride=st.lists(SIZES, max_size=3).map(tuple),
    write=st.sampled_from([made.torch_zip, made.torch_legacy]),
)
def test_a_tensor_lies_within_its_storage_or_is_refused(
    offset, size, stride, write, tmp_path_factory
):
    path = tmp_path_factory.getbasetemp() / "view"
    content = {"x": tensor(BASE, "0", offset=offset, size=size, stride=stride)}
    path.write_bytes(write(content, {"0": BASE}))
    try:
        found = read_checkpoint(path)["x"]
    except InputError:
        assert offset or size != (4, 6) or stride != (6, 1)
        return
    assert found.shape == size and found.size <= BASE.size
    for index in np.ndindex(size) if found.size else ():  # it counts along every side
        place = offset + sum(i * step for i, step in zip(index, stride, strict=True))
        assert found[index] == BASE.reshape(-1)[place]


@pytest.mark.parametrize(
    "changes",
    [
        {"size": (1,) * 40, "stride": (1,) * 40},
        {"size": 24},
        {"tail": (("k", 0, 4),)},  # a part of a storage, as PyTorch wrote before 0.4
        *({"numel": numel} for numel in (25, -1, 2**62)),
        *({"key": key} for key in ("absent", "../../0")),
        *({"kind": kind} for kind in ("FloatStorage", "torch.FloatStorage")),
        *({"kind": Name("torch", kind)} for kind in ("Size", "ComplexFloatStorage")),
    ],
    ids=str,
)
def test_storages_that_do_not_fit_the_file(changes, file):
    content = {"x": tensor(BASE, "0", **changes)}
    for write in (made.torch_zip, made.torch_legacy):
        refusal(file(write(content, {"0": BASE})))


@pytest.mark.parametrize(
    "changes",
    [
        *({"shape": shape} for shape in ([5, 6], [-4, -6], [2**40, 2**40], "46", [4.0, 6.0], None)),
        *({"dtype": dtype} for dtype in ("F8_E4M3", ["F32"])),
        *({"data_offsets": offsets} for offsets in ([0, 92], [4, 100], [-96, 0], [0, 2**62], "x")),
    ],
    ids=str,
)
def test_safetensors_headers_that_do_not_fit_the_data(changes, file):
    refusal(file(made.safetensors({"x": BASE}, x=changes)))


EMPTY_ARRAY = Call(
    Name("numpy.core.multiarray", "_reconstruct"), (Name("numpy", "ndarray"), (0,), b"b")
)
PLAIN = (3, "<", None, None, None, -1, -1, 0)


def array_of(dtype, shape, data, state=PLAIN, times=1) -> Raw:
    """A numpy array as it is pickled: first made, then filled."""
    kind = opcodes(Call(Name("numpy", "dtype"), (dtype, False, True)), state, b"b")
    filled = encode((1, shape, kind, False, data)) + b"b"
    return Raw(encode(EMPTY_ARRAY) + filled * times)


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
        array_of("f4", (1,), b"1234", times=2),  # whose first content something may still view
        array_of(("f4", 4), (1,), b"1234"),
        array_of("(2)f4", (1,), b"12345678"),
        array_of("f4,i4", (1,), b"12345678"),
        array_of("M8[s]", (1,), b"12345678"),
    ],
    ids=repr,
)
def test_numpy_types_and_shapes_that_are_not_plain_numbers(array, file):
    refusal(file(pickled({"x": array})))


# ---- attacks: the functions that a pickle names, in every place of every format


# A shell command is all that a real attack needs; this one cannot even do harm if it runs.
COMMAND = "true"
NESTED = pickled(call("os.system", COMMAND))

# What a pickle calls, and with what. The message names the function.
CALLS = [
    ("os.system", COMMAND),
    ("posix.system", COMMAND),
    ("builtins.eval", '__import__("os").system("true")'),
    ("builtins.eval", "data()", {"data": 1}),
    ("builtins.eval", "data", {"data": 1, "len": 2}),
    ("__builtin__.eval", "1"),
    ("builtins.exec", "import os"),
    ("builtins.__import__", "os"),
    ("builtins.str", "x"),
    ("builtins.getattr", "x", "join"),
    ("operator.attrgetter", "system"),
    ("functools.partial", COMMAND),
    ("subprocess.Popen", [COMMAND]),
    ("torch.storage._load_from_bytes", NESTED),
    ("pickle.loads", NESTED),
    ("numpy.load", "x.npy"),
    ("numpy.f2py.crackfortran.myeval", "1"),
]

SET = Name("builtins", "set")
# Other ways to a function -> (value to put into a pickle, what the message names).
ATTACKS = {
    **{f"{name}{arguments}": (call(name, *arguments), name.split(".")[-1])
       for name, *arguments in CALLS},
    "nested call": (call("collections.OrderedDict", [("x", call(*CALLS[0]))]), "os.system"),
    "call of a result": (Call(call("collections.OrderedDict"), ()), "not callable"),
    "call of text": (Call("os.system", (COMMAND,)), "not callable"),
    "arguments in a list": (opcodes(SET, [1], b"R"), "must be a tuple"),
    "object with a state": (Made(Name("shutil", "Thing"), {"x": 1}), "shutil.Thing"),
    "state of a name": (opcodes(SET, {"build": 1}, b"b"), "the state of builtins.set"),
    "slots of a name": (opcodes(SET, (None, {"build": SET}), b"b"), "the state of builtins.set"),
    "state of a class": (opcodes(Name("argparse", "Namespace"), {"x": 1}, b"b"), "__setstate__"),
    "slots of attributes": (Made(Name("argparse", "Namespace"), (None, {"x": 1})), "the state of"),
    "state of a list": (opcodes([1], {"x": 1}, b"b"), "damaged"),
    "instance": (opcodes(b"(", COMMAND, b"ios\nsystem\n"), "INST"),
    "old-style object": (opcodes(b"(cos\nsystem\n", COMMAND, b"o"), "OBJ"),
    "new object with keywords": (opcodes(b"csubprocess\nPopen\n)}\x92"), "NEWOBJ_EX"),
    "new object of no class": (opcodes(SET, b")\x81"), "damaged"),
    "name from the stack": (opcodes("os", "system", b"\x93", (COMMAND,), b"R"), "os.system"),
    "dotted name": (opcodes("builtins", "dict.fromkeys", b"\x93"), "dict.fromkeys"),
    "attribute": (opcodes("_codecs", "encode.__globals__", b"\x93"), "__globals__"),
    "registered extension": (opcodes(b"\x82\x01)R"), "opcode"),
    "copyreg": (call("copyreg._reconstructor", SET, SET, None), "copyreg._reconstructor"),
    "default factory": (call("collections.defaultdict", Name("os", "getcwd")), "os.getcwd"),
    "codec": (call("_codecs.encode", "x", "rot13"), "rot13"),
}  # fmt: skip

# Format -> file around a value. Values go where PyTorch and Paddle put tensors, names and options.
FORMATS = {
    "torch zip": lambda value: made.torch_zip({"x": tensor(BASE, "0"), "y": value}, {"0": BASE}),
    "torch zip, storage reference": lambda value: made.torch_zip(
        {"x": Reference(("storage", value, "0", "cpu", 4))}, {"0": BASE}
    ),
    "torch zip, storage key": lambda value: made.torch_zip(
        {"x": tensor(BASE, "0", key=value)}, {"0": BASE}
    ),
    "torch legacy": lambda value: made.torch_legacy({"y": value}, {}),
    "torch legacy, system": lambda value: made.torch_legacy({}, {}, system={"x": value}),
    "torch legacy, protocol": lambda value: made.torch_legacy({}, {}, version=value),
    "torch legacy, keys": lambda value: made.torch_legacy({}, {})[:-4] + encode(value) + b".",
    "paddle": lambda value: pickled({"w": b"1234", "epoch": value}),
    "paddle protocol 4": lambda value: b"\x80\x04" + encode({"x": [value]}) + b".",
    "paddle, named tensor": lambda value: pickled({"w": call("builtins.tuple", ("w", value))}),
    "paddle, dense": lambda value: pickled({"w": call("builtins.eval", "data", {"data": value})}),
}

_events: list[str] = []
_watching = False
_WATCHED = ("import", "exec", "compile", "os.", "subprocess.", "pickle.", "socket.", "ctypes.")


def _watch(event: str, arguments: tuple) -> None:
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if _watching and (event.startswith(_WATCHED) or writes):
        _events.append(f"{event} {arguments}")


sys.addaudithook(_watch)


def ran(function) -> list[str]:
    """What the interpreter was seen to do while a function was called."""
    global _watching
    _events.clear()
    _watching = True
    try:
        function()
    finally:
        _watching = False
    return list(_events)


def test_the_watch_sees_what_an_unsafe_loader_would_do():
    assert any("os.system" in event for event in ran(lambda: pickle.loads(NESTED)))


@pytest.mark.parametrize("attack", ATTACKS)
def test_refused_by_name_in_every_format_and_nothing_ran(attack, file):
    value, name = ATTACKS[attack]
    read_checkpoint(file(made.every_format()["torch zip"]))  # imports the codec of zip archives
    for format_name, write in FORMATS.items():
        path = file(write(value))
        messages = []
        assert ran(lambda path=path, out=messages: out.append(refusal(path))) == [], format_name
        assert name in messages[0], format_name
        if "asks for" in messages[0] and "eval" not in messages[0]:
            assert "Nothing was run" in messages[0]
            assert "ask for one that holds the weights" in messages[0]


def test_members_that_are_pickles_are_only_bytes(file):
    """A storage's content is never unpickled, whatever it looks like."""
    storage = numbers(len(NESTED))
    data = made.torch_zip({"x": tensor(storage, "0")}, {"0": storage}, **{"data.pkl.bak": NESTED})
    path = file(data.replace(storage.tobytes(), (NESTED * 4)[: storage.nbytes]))
    assert ran(lambda: read_checkpoint(path)) == []


@settings(max_examples=200, deadline=None)
@given(name=st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8})?\.[A-Za-z_]{1,12}", fullmatch=True))
def test_no_name_but_those_of_the_table_is_found(name, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "name"
    path.write_bytes(pickled({"x": Name(*name.rsplit(".", 1))}))
    with open(path, "rb") as raw, pickles.SourceFile(Path(raw.name)) as source:
        known = pickles.known_globals(source, {})
    if name not in known:
        assert f"asks for {name!r}" in refusal(path)


# ---- memory and time


def nested_tuples(depth: int) -> Raw:
    """A tuple that holds the one before it twice: hashing or printing takes 2**depth steps."""
    return Raw(b")" + b"q\x00h\x00\x86" * depth)


TWICE = nested_tuples(100)


@pytest.mark.parametrize(
    "data",
    [
        pickled({"x": Raw(b"r\xff\xff\xff\xff")}),  # a memo index: 32 GB of room
        b"\x80\x02]r\xff\xff\xff\x7f.x",
        b"\x80\x02X\xff\xff\xff\xffabc.",  # text of 4 GB
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fabc.",  # bytes of 8 EB
        b"\x80\x04\x96" + b"\x00" * 6 + b"\x01\x00abc.",
        b"\x80\x04\x95" + b"\x00" * 6 + b"\x01\x00N.",  # a frame
        b"\x80\x02\x8b\xff\xff\xff\x7f1.",  # an integer of 2 GB
        b"\x80\x02T\xff\xff\xff\xffabc.",  # a negative length
        b"\x80\x02}" + TWICE + b"Ns.",  # as a key
        b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"Ns.",  # deep enough for C's stack
        pickled(array_of(TWICE, (1,), b"1")),  # in error messages
        pickled(array_of("f4", TWICE, b"1")),
        pickled(call("_codecs.encode", "x", TWICE)),
        made.torch_zip({"x": tensor(BASE, "0", size=TWICE)}, {"0": BASE}),
        made.torch_zip({"x": tensor(BASE, "0", key=TWICE)}, {"0": BASE}),
        made.torch_zip({"x": Reference(TWICE)}, {}),
        pickled(Raw(TWICE + encode("x") + b"\x93")),
        made.torch_legacy({}, {})[: -len(pickled([]))] + pickled([TWICE]),
        pickled(array_of("f4", (2**2000,) * 32, b"1")),
        b"\x80\x02}(](K\x01e" + b"K\x01u.",  # a list as a key
        b"\x80\x02h\x05.",  # an entry that the memo does not have
        *(b"\x80\x02" + rest for rest in (b"0.", b".", b"u.", b"]K\x01a", b")K\x01a.", b"(0N.")),
        *(b"\x80\x02" + rest for rest in (b"\x82\x01.", b"\x97.", b"K\x05)R.", b"N)R.", b"I1\n.")),
        pickled(Reference("x")),
    ],
    ids=lambda data: "",
)
def test_hostile_opcodes_are_refused_at_once(data, file):
    refusal(file(data))


def test_deep_nesting_and_cycles_do_not_recurse(file):
    deep = read_checkpoint(file(b"\x80\x02" + b"](" * 2000 + b"e" * 2000 + b"."))
    for _ in range(1999):
        (deep,) = deep
    cycle = read_checkpoint(file(b"\x80\x02]q\x00h\x00a."))
    assert cycle[0] is cycle


@pytest.mark.parametrize("opcode", [b"\x8f", b"}", b"]", b"(", b"N", b"h\x00", b")\x85", b"\x94"])
def test_no_opcode_makes_more_than_it_is_charged_for(opcode, file):
    data = b"\x80\x04]q\x00(" + opcode * 20_000 + b"e."
    assert peak_bytes(file(data)) <= pickles._OPCODE_BYTES * len(opcode) * 20_000 + 2**16


MANY = {
    "sets": b"\x8f" * 100_000,
    "texts": made.encode("x" * 3000)
    + b"q\x000c_codecs\nencode\nq\x010"
    + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 5_000,  # one text, copied
    "lists": b"]("
    + b"K\x01" * 500
    + b"eq\x000c__builtin__\nset\nq\x010"
    + b"h\x01h\x00\x85R" * 500,
}


@pytest.mark.parametrize("kind", [*MANY, "entries", "members", "views"])
def test_what_would_take_more_than_four_times_the_file_is_refused(kind, file, monkeypatch):
    monkeypatch.setattr(pickles, "_ALLOWANCE_BYTES", 2**20)  # instead of 256 MiB
    if kind in MANY:
        data = b"\x80\x02](" + MANY[kind] + b"e."
    elif kind == "entries":
        data = made.safetensors({f"{i:x}": numbers(1, dtype="f2") for i in range(5_000)})
    elif kind == "members":
        empty = {f"{i:x}": numbers(0) for i in range(5_000)}
        data = made.torch_zip({}, empty)
    else:  # one storage under many names
        base = numbers(2**17)
        data = made.torch_zip([tensor(base, "0") for _ in range(20)], {"0": base})
    path = file(data)
    assert "MiB of memory, which no honest checkpoint of" in refusal(path)
    assert peak_bytes(path) <= 4 * len(data) + 2**20


# ---- any damage

FILES = list(made.every_format().values())
PLACES = st.integers(0, 2**16)
BYTES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from(
        [b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\x00" * 4, b"\xff\xff\xff\x7f", b"\x80"]
    ),
    st.builds(lambda file, at: FILES[file][at : at + 60], st.integers(0, len(FILES) - 1), PLACES),
)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    which=st.integers(0, len(FILES) - 1),
    injuries=st.lists(st.tuples(PLACES, st.sampled_from([0, 1, 8, 60, 10**6]), BYTES), max_size=4),
)
def test_any_damaged_file_is_read_or_refused(which, injuries, tmp_path_factory):
    """20,000 files were tried by hand, with the reference files among them."""
    data = FILES[which]
    for at, length, replacement in injuries:
        at %= len(data) + 1
        data = data[:at] + replacement + data[at + length :]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    try:
        read_checkpoint(path)
    except InputError as error:
        assert str(error).startswith(f"{path}: ")


def test_every_truncation_is_refused(file):
    for data in FILES:
        for length in range(1, len(data), 7):
            refusal(file(data[:length]))
