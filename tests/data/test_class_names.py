"""Where the names of the classes come from."""

import pytest
from data_sets import configured

from replknet_paddle.config import get_config
from replknet_paddle.data.class_names import class_names_text, get_class_names, read_class_names
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.zoo import find_record, list_models


def test_class_names_come_from_the_config_or_beside_the_lists_or_the_project(
    tmp_path, tiny_config_file
):
    config = configured(tiny_config_file, tmp_path)
    assert get_class_names(config) is None
    (tmp_path / "class_names.txt").write_text("a\nb\nc\nd\n")
    assert get_class_names(config) == ["a", "b", "c", "d"]
    other = tmp_path / "other.txt"
    other.write_bytes("\ufeffâne\r\nb b\r\nc\r\nd".encode())
    named = configured(tiny_config_file, tmp_path, "DATA.CLASS_NAMES", other)
    assert get_class_names(named) == ["âne", "b b", "c", "d"]
    other.write_text("a\n\nc\n")
    with pytest.raises(InputError, match="3 lines, 1 of them empty; allowed: .* 4 classes"):
        get_class_names(named)
    for name, near in (("nothing", r"nothing\)$"), ("ade20", r"; did you mean ade20k\?")):
        with pytest.raises(FileNotFoundError, match=near):
            get_class_names(configured(tiny_config_file, tmp_path, "DATA.CLASS_NAMES", name))


def test_class_names_end_at_line_feeds_only_and_are_read_back(tmp_path):
    names = ["a\u2028b", "c\x0cd", "e\x85f", "ḡ h", "猫"]
    (tmp_path / "names.txt").write_bytes(class_names_text(names).encode())
    assert read_class_names(str(tmp_path / "names.txt"), 5) == names
    for wrong in ("", "a\nb", " a", "a\u2003", "caf\udce9"):
        with pytest.raises(InputError) as caught:
            class_names_text(["fine", wrong])
        assert f"the class name {ascii(wrong)} cannot stand in class_names.txt" in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_class_names_in_utf16_are_named_so(tmp_path, encoding):
    (tmp_path / "names.txt").write_bytes("cat\ndog\n".encode(encoding))
    with pytest.raises(InputError, match="names.txt seems to be text in UTF-16.*UTF-8$"):
        read_class_names(str(tmp_path / "names.txt"))


def test_imagenet_names_are_in_the_order_of_the_synsets(tmp_path, tiny_config_file):
    config = get_config("configs/replknet_31b.yaml")
    names = get_class_names(config)
    assert len(set(names)) == 1000
    known = {0: "tench", 134: "crane bird", 207: "golden retriever", 388: "giant panda"}
    known |= {517: "crane", 638: "maillot", 999: "toilet tissue"}
    assert {index: names[index] for index in known} == known


def test_only_a_config_that_says_so_gets_imagenets_names(tmp_path, tiny_config_file):
    other = configured(tiny_config_file, tmp_path, "MODEL.NUM_CLASSES", 1000)
    assert get_class_names(other) is None
    for record in list_models():
        config = get_config(f"configs/{find_record(record).config}", DATA__DATA_PATH=str(tmp_path))
        assert (get_class_names(config) is not None) == (config.MODEL.NUM_CLASSES == 1000)
    tuned = get_config("configs/replknet_31b.yaml", MODEL__NUM_CLASSES=5)
    assert get_class_names(tuned) is None
    (tmp_path / "class_names.txt").write_text("own\n" * 1000)
    own = get_config("configs/replknet_31b.yaml", DATA__DATA_PATH=str(tmp_path))
    assert get_class_names(own) == ["own"] * 1000
