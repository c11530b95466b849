"""The sidecar brings back what it was given, and says what is wrong with one that cannot be."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from small_networks import small_config
from tiny import FIXTURES

from replknet_paddle.data.transforms import build_eval_transform
from replknet_paddle.deploy.sidecar import FILE, Sidecar
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import file_sha256

NAMES = ["Ähre", "b", "c", "d", "e"]


@pytest.fixture
def sidecar(tmp_path):
    return Sidecar.build(
        small_config(tmp_path),
        format="onnx",
        precision="int8",
        class_names=NAMES,
        source_sha256="0" * 64,
        paddle_version="3.3.1",
    )


@pytest.fixture
def content(tmp_path, sidecar):
    """The written file's entries, to be spoilt."""
    sidecar.write(tmp_path)
    return json.loads((tmp_path / FILE).read_text(encoding="utf-8"))


def test_what_is_written_is_read(tmp_path, sidecar):
    sidecar.write(tmp_path)
    digest = file_sha256(tmp_path / "small.yaml")
    assert Sidecar.read(tmp_path) == replace(sidecar, files={"small.yaml": digest})
    assert sidecar.class_names == tuple(NAMES) and sidecar.num_classes == 5


@pytest.mark.parametrize("mode", ["short_crop", "warp"])
def test_its_preprocessing_is_that_of_evaluation(tmp_path, mode):
    config = small_config(tmp_path).clone()
    config.defrost()
    config.DATA.RESIZE_MODE, config.DATA.IMAGENET_MEAN = mode, [0.5, 0.4, 0.3]
    Sidecar.build(config, format="onnx").write(tmp_path)
    with Image.open(FIXTURES / "images" / "landscape_499x375.jpg") as image:
        expected = build_eval_transform(config)(image)
        given = Sidecar.read(tmp_path).build_eval_transform()(image)
    assert np.array_equal(given, expected)


def test_an_export_from_before_native_pixels_is_read(tmp_path, content):
    del content["preprocessing"]["native_pixels"]
    (tmp_path / FILE).write_text(json.dumps(content))
    assert Sidecar.read(tmp_path).preprocessing.native_pixels is True


def test_names_must_be_as_many_as_classes(tmp_path):
    with pytest.raises(InputError, match="4 class names for 5 classes"):
        Sidecar.build(small_config(tmp_path), format="onnx", class_names=NAMES[:4])


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no export folder"):
        Sidecar.read(tmp_path / "nowhere")


def test_a_folder_without_a_sidecar_is_no_export(tmp_path):
    with pytest.raises(InputError, match=r"no replknet\.json; replknet export"):
        Sidecar.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"a": 1', "\udcff", "[" * 100_000])
def test_what_is_no_object_is_refused(tmp_path, text):
    (tmp_path / FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"replknet\.json"):
        Sidecar.read(tmp_path)


@pytest.mark.parametrize("version", [2, 0, "1", None, [1]])
def test_another_format_version_is_refused(tmp_path, content, version):
    (tmp_path / FILE).write_text(json.dumps({**content, "format_version": version}))
    with pytest.raises(InputError, match="format_version .*this program reads 1"):
        Sidecar.read(tmp_path)


WRONG = {
    "format": ["tflite", None, ["onnx"]],
    "precision": ["fp8", 8],
    "input_size": [[224], "224", [0, 224], [1.5, 2]],
    "num_classes": [0, True, "5", 4],
    "class_names": [["a"], "abcde", [1, 2, 3, 4, 5]],
    "architecture": [None, 3],
    "source_sha256": [1],
    "preprocessing": [None, [], {}],
    "files": [None, {"../x": ""}, {"a/b": ""}, {"..": ""}, {"": ""}, {"a\\b": ""}, {"x": 1}],
}
WRONG_PREPROCESSING = {
    "image_size": [0, -1, "32", 10**30],
    "crop_pct": [0, 2, "1", float("nan")],
    "mode": ["crop", {}],
    "mean": [[0.5, 0.5], 0.5, ["a", "b", "c"]],
    "std": [[0, 1, 1], None],
    "interpolation": ["nearest"],
    "native_pixels": [1, None, "True"],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_entry_is_named(tmp_path, content, key):
    for value in WRONG[key]:
        (tmp_path / FILE).write_text(json.dumps({**content, key: value}))
        with pytest.raises(InputError, match=key):
            Sidecar.read(tmp_path)


@pytest.mark.parametrize("key", WRONG_PREPROCESSING)
def test_a_wrong_entry_of_the_preprocessing_is_named(tmp_path, content, key):
    for value in WRONG_PREPROCESSING[key]:
        preprocessing = {**content["preprocessing"], key: value}
        (tmp_path / FILE).write_text(json.dumps({**content, "preprocessing": preprocessing}))
        with pytest.raises(InputError, match=f"preprocessing.{key}"):
            Sidecar.read(tmp_path)


def test_all_that_is_missing_or_unknown_is_named_together(tmp_path, content):
    del content["num_classes"], content["format"]
    (tmp_path / FILE).write_text(json.dumps({**content, "colour": "red"}))
    with pytest.raises(InputError) as error:
        Sidecar.read(tmp_path)
    for part in ("num_classes is missing", "format is missing", "unknown entry colour"):
        assert part in str(error.value)


def test_files_are_those_that_were_written(tmp_path, sidecar):
    (tmp_path / "model").write_bytes(b"model")
    sidecar.write(tmp_path)
    written = Sidecar.read(tmp_path)
    written.verify(tmp_path)
    (tmp_path / "model").write_bytes(b"m0del")
    with pytest.raises(InputError, match="is not the file that"):
        written.verify(tmp_path)
    (tmp_path / "model").unlink()
    with pytest.raises(InputError, match="has no model"):
        written.verify(tmp_path)


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert file_sha256(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")
