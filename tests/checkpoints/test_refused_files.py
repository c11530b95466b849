"""Refused files: of other kinds, damaged, or made to take memory or time without a bound."""

import io
import tracemalloc
import zipfile

import handmade as made
import numpy as np
import pytest

from replknet_paddle.checkpoints.readers import read_checkpoint
from replknet_paddle.runtime.errors import InputError


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
    refused(made.torch_zip({}, {}, compress=True), "compressed")
    refused(made.torch_zip({}, {}, byteorder=b"big"), "big-endian")


def test_every_truncation_is_refused(file):
    for data in made.every_format().values():
        for length in range(1, len(data), 7):
            with pytest.raises(InputError):
                read_checkpoint(file(data[:length]))


BASE = made.numbers(4, 6)


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
        {"kind": made.Name("torch", "Size")},
        {"kind": made.Name("torch", "ComplexFloatStorage")},
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_their_storage(changes, refused):
    content = {"x": made.tensor(BASE, "0", **changes)}
    refused(made.torch_zip(content, {"0": BASE}))
    refused(made.torch_legacy(content, {"0": BASE}))


@pytest.mark.parametrize("part", [("k", -1, 3), ("k", 20, 10), ("k", 0, -1), ("k", 2**63, 1), 5])
def test_parts_beyond_a_legacy_storage(part, refused):
    refused(made.torch_legacy({"x": made.tensor(BASE, "0", tail=(part,))}, {"0": BASE}))


def test_legacy_headers_that_are_not_ours(refused):
    refused(made.torch_legacy({}, {}, version=1000), "version or byte order")
    refused(made.torch_legacy({}, {}, system={"little_endian": False}), "byte order")
    keys_twice = made.pickled(["0", "0"])
    data = made.torch_legacy({"x": made.tensor(BASE, "0")}, {"0": BASE})
    refused(data.replace(made.pickled(["0"]), keys_twice))


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
    refused(made.safetensors({"x": BASE}, x=changes))


def test_safetensors_with_overlaps_gaps_or_a_tail(refused):
    entry = {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]}
    refused(made.safetensors({"x": BASE}, y=entry))
    refused(made.safetensors({"x": BASE}) + b"1234", "not fully covered")
    refused(made.safetensors({"x": BASE}, {"a": 1}), "expected a string")
    refused((2**20).to_bytes(8, "little") + b"{" + b"[" * 2**20)


EMPTY_ARRAY = made.Call(
    made.Name("numpy.core.multiarray", "_reconstruct"),
    (made.Name("numpy", "ndarray"), (0,), b"b"),
)


def array_of(dtype, shape, data, state=(3, "<", None, None, None, -1, -1, 0)):
    """A numpy array as it is pickled: first made, then filled."""
    kind = made.Raw(
        made.encode(made.Call(made.Name("numpy", "dtype"), (dtype, False, True)))
        + made.encode(state)
        + b"b"
    )
    return made.Raw(made.encode(EMPTY_ARRAY) + made.encode((1, shape, kind, False, data)) + b"b")


def test_numpy_array_made_by_hand_is_read(file):
    found = read_checkpoint(file(made.pickled({"x": array_of("f4", (4, 6), BASE.tobytes())})))
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
    refused(made.pickled({"x": array}))


def test_numpy_array_that_never_gets_content(refused):
    refused(made.pickled({"x": EMPTY_ARRAY}), "before its content")
    refused(made.pickled([EMPTY_ARRAY, EMPTY_ARRAY]), "before its content")


def nested_tuples(depth: int) -> made.Raw:
    """A tuple that holds the one before it twice: hashing or printing takes 2**depth steps."""
    return made.Raw(b")" + b"q\x00h\x00\x86" * depth)


@pytest.mark.parametrize(
    "data",
    [
        made.pickled(
            {"x": made.Raw(b"r\xff\xff\xff\xff")}
        ),  # a memo index: without a bound 32 GB in C pickle
        b"\x80\x02]r\xff\xff\xff\x7f.x",
        b"\x80\x02X\xff\xff\xff\xffabc.",  # text of 4 GB
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fabc.",  # bytes of 8 EB
        b"\x80\x04\x96" + b"\x00" * 6 + b"\x01\x00abc.",
        b"\x80\x02\x8b\xff\xff\xff\x7f1.",  # an integer of 2 GB
        b"\x80\x02T\xff\xff\xff\xffabc.",  # a negative length
        b"\x80\x02}" + nested_tuples(100) + b"Ns.",  # as a key
        made.pickled(array_of(nested_tuples(100), (1,), b"1")),  # in error messages
        made.pickled(array_of("f4", nested_tuples(100), b"1")),
        made.pickled(made.Call(made.Name("_codecs", "encode"), ("x", nested_tuples(100)))),
        made.torch_zip({"x": made.tensor(BASE, "0", size=nested_tuples(100))}, {"0": BASE}),
        made.torch_zip({"x": made.tensor(BASE, "0", offset=nested_tuples(100))}, {"0": BASE}),
        made.torch_zip({"x": made.tensor(BASE, "0", key=nested_tuples(100))}, {"0": BASE}),
        made.torch_zip({"x": made.Reference(nested_tuples(100))}, {}),
        made.pickled(made.Raw(nested_tuples(100) + made.encode("x") + b"\x93")),
        made.pickled(made.Raw(made.encode("x") + nested_tuples(100) + b"\x93")),
        made.pickled(
            {"UnpackBigParamInfor@@": {"w": {"OriginShape": (1,), "slices": [nested_tuples(100)]}}}
        ),
        made.torch_legacy({}, {})[: -len(made.pickled([]))] + made.pickled([nested_tuples(100)]),
        made.pickled(array_of("f4", (2**2000,) * 32, b"1")),
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
        made.pickled(made.Reference("x")),
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


@pytest.mark.parametrize("opcode", [b"\x8f", b"}", b"]", b"(", b"N", b"K\x01", b"h\x00", b")\x85"])
def test_no_opcode_makes_more_than_it_is_charged_for(opcode, file):
    data = b"\x80\x02]q\x00(" + opcode * (2**22 // len(opcode)) + b"e."
    path = file(data)
    tracemalloc.start()
    with pytest.raises(InputError, match="more than twice"):
        read_checkpoint(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes <= 2 * len(data) + 2**24


def test_headers_whose_entries_outweigh_them_are_refused_before_they_are_parsed(refused):
    """What the library and `zipfile` make of an entry takes more memory than the entry."""
    entries = {f"{i:x}": np.zeros(1, "f2") for i in range(50_000)}
    refused(made.safetensors(entries), "more than twice")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(40_000):
            archive.writestr(f"{i:x}", b"")
    refused(buffer.getvalue(), "more than twice")


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
    base = made.numbers(2**20)
    content = [made.tensor(base, "0") for _ in range(20)]
    refused(made.torch_zip(content, {"0": base}), "more than twice")


def test_made_object_with_a_state_that_is_not_attributes(refused):
    refused(made.pickled(made.Made(made.Name("argparse", "Namespace"), [1])), "state")
