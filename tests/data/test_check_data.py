"""Checking datasets with every kind of damage."""

import json
import os
from io import BytesIO

import faulty_storage
import numpy as np
import pytest
from data_sets import image_tree, picture, write
from PIL import Image
from tiny import command

from replknet_paddle.config import get_config
from replknet_paddle.data import check_data as checking
from replknet_paddle.data.check_data import KINDS
from replknet_paddle.data.dataset import get_dataset
from replknet_paddle.data.make_lists import make_lists, make_shapes

check_data_command = command("check-data")


def check_data(folder: str, *, num_classes=None, allow_outside=False, **options) -> dict:
    config = get_config(
        DATA__DATA_PATH=folder,
        DATA__ALLOW_OUTSIDE=allow_outside,
        DATA__BATCH_SIZE=1,
        TRAIN__ACCUM_ITER=1,
        MODEL__NUM_CLASSES=num_classes,
    )
    return checking.check_data(config, get_dataset, **options)


def damaged(folder):
    """A data set with each kind of damage; returns {kind: [(list, line)]}."""
    names = [f"train/{i}.jpg" for i in range(8)] + ["val/0.jpg", "val/1.jpg"]
    image_tree(folder, [*names, "train/odd/8.jpg", "val/odd/2.jpg"])
    write(folder.parent / "outside.jpg", picture(100))
    (folder / "train" / "link.jpg").symlink_to(folder.parent / "outside.jpg")
    write(folder / "train" / "text.jpg", b"no image at all")
    half = picture(50)
    write(folder / "train" / "half.jpg", half[: len(half) // 2])
    write(folder / "train" / "empty.jpg", b"")
    broken = bytearray(picture(51, "PNG"))
    broken[60] ^= 255
    write(folder / "train" / "broken.png", bytes(broken))
    deep = np.full((8, 8), 40_000, np.uint16)
    Image.fromarray(deep).save(folder / "train" / "deep.png")
    write(folder / "val" / "copy.jpg", (folder / "train" / "3.jpg").read_bytes())
    write(folder / "train" / "copy.jpg", (folder / "train" / "0.jpg").read_bytes())
    write(folder / "val" / "again.jpg", (folder / "val" / "1.jpg").read_bytes())
    train = [
        ("train/0.jpg 0", None),
        ("train/1.jpg 1", None),
        ("train/2.jpg", "line"),
        ("train/3.jpg 4", None),
        ("train/4.jpg 5", "label"),
        ("train/5.jpg -1", "label"),
        ("train/1.jpg 1", "duplicate"),
        ("../outside.jpg 1", "outside"),
        ("/etc/hostname 1", "outside"),
        ("train/link.jpg 1", "outside"),
        ("train/none.jpg 1", "missing"),
        ("", None),
        ("train/text.jpg 1", "undecodable"),
        ("train/half.jpg 1", "truncated"),
        ("train/empty.jpg 1", "truncated"),
        ("train/broken.png 3", "undecodable"),
        ("train/deep.png 1", "undecodable"),
        ("train/copy.jpg 3", "conflict"),
        ("train/odd/8.jpg 1", None),
    ]
    val = [
        ("val/0.jpg 0", None),
        ("val/1.jpg 1", None),
        ("train/0.jpg 0", "overlap"),
        ("val/copy.jpg 4", "overlap"),
        ("val/again.jpg 0", "conflict"),
        ("val/1.jpg one", "line"),
        ("val/odd/2.jpg 0", None),
    ]
    (folder / "class_names.txt").write_text("a\nb\n")  # for 5 classes
    # Class 2 has no training image, class 3 no validation image, and `odd` another label there.
    expected = [("empty class", "train_list.txt", 0), ("names", "class_names.txt", 0)]
    expected += [(kind, "val_list.txt", 0) for kind in ("no validation", "shifted")]
    for name, content in (("train_list.txt", train), ("val_list.txt", val)):
        (folder / name).write_text("".join(f"{line}\n" for line, _ in content))
        expected += [(kind, name, number) for number, (_, kind) in enumerate(content, 1) if kind]
    return sorted(expected)


def test_every_kind_of_damage_is_found_and_nothing_else(tmp_path):
    expected = damaged(tmp_path / "data")
    report = check_data(str(tmp_path / "data"), num_classes=5, workers=2)
    found = [(problem["kind"], problem["list"], problem["line"]) for problem in report["problems"]]
    assert sorted(found) == expected
    assert {kind for kind, _, _ in found} == set(KINDS) - {"list"}
    assert report["counts"] == {kind: [k for k, _, _ in found].count(kind) for kind in KINDS}
    assert report["lists"]["val_list.txt"]["images_per_class"] == [4, 1, 0, 0, 1]
    messages = {(problem["kind"], problem["message"]) for problem in report["problems"]}
    copied = "class 3; the same bytes have class 0 in line 1 of train_list.txt"
    assert ("conflict", f"train/copy.jpg has {copied}") in messages
    assert ("overlap", "train/0.jpg is also in line 1 of train_list.txt") in messages
    assert ("no validation", "class 3 has training images and no validation image") in messages
    assert ("missing", "cannot read image train/none.jpg: no such file or directory") in messages
    (tmp_path / "data" / "val_list.txt").unlink()
    kinds = check_data(str(tmp_path / "data"), num_classes=5)["counts"]
    assert not any(kinds[kind] for kind in ("overlap", "no validation", "shifted"))
    assert kinds["list"] == 1  # evaluation needs it


def test_command_line_reports_and_says_so_by_its_status(tmp_path, capsys):
    damaged(tmp_path / "data")
    report = tmp_path / "report.json"
    arguments = [str(tmp_path / "data"), "-num_classes", "5", "-workers", "1"]
    assert check_data_command([*arguments, "-output", str(report)]) == 1
    assert len(json.loads(report.read_text())["problems"]) == 22
    out = capsys.readouterr().out
    assert "train_list.txt, line 3: expected a path and a label, got 'train/2.jpg'" in out
    assert "line 0:" not in out and out.endswith(f"Problems found: 22\nwrote {report}\n")

    image_tree(tmp_path / "good", ["train/a/0.jpg"])
    image_tree(tmp_path / "good", ["other/b/0.jpg", "val/a/1.jpg"])
    make_lists(str(tmp_path / "good"), train="train", val="val")
    assert check_data_command([str(tmp_path / "good"), "-workers", "1"]) == 0
    assert capsys.readouterr().out.endswith("No problems found\n")


def test_what_training_or_evaluation_refuses_is_a_problem(tmp_path, capsys):
    """By their own words, with the sizes and classes of the configuration where one is given."""
    write(tmp_path / "class_names.txt", b"cat\n\xe9\n")
    long = BytesIO()
    Image.new("L", (65_536, 1)).save(long, "PNG")
    image_tree(tmp_path, ["train/a.jpg", "train/b.jpg", "val/a.jpg"])
    write(tmp_path / "val" / "long.png", long.getvalue())
    (tmp_path / "train_list.txt").write_text("train/a.jpg 0\ntrain/b.jpg 1\n")

    def check(*arguments) -> str:
        assert check_data_command([str(tmp_path), "-workers", "1", *arguments]) == 1
        return capsys.readouterr().out

    out = check()
    assert f"{tmp_path}/class_names.txt is not UTF-8 text: " in out
    assert f"\nno list file {tmp_path}/val_list.txt; " in out and "Problems found: 2\n" in out

    (tmp_path / "class_names.txt").unlink()
    (tmp_path / "val_list.txt").write_text("val/long.png 0\nval/a.jpg 1\n")
    out = check()
    assert "val_list.txt, line 1: cannot read image val/long.png: image of 65536 x 1 " in out
    assert "Problems found: 1\n" in out
    # Evaluation of this one makes a square of it, and its batch is of 64 images.
    config = ["-cfg", "configs/replknet_nano.yaml", "-num_classes", "2"]
    out = check(*config, "-opts", "DATA.RESIZE_MODE", "warp", "DATA.BATCH_SIZE", "64")
    assert "train_list.txt lists 2 images, fewer than one global batch (DATA.BATCH_SIZE 64" in out
    assert "Problems found: 1\n" in out
    (tmp_path / "train_list.txt").write_text("train/a.jpg 0\ntrain/b.jpg 7\n")
    out = check("-cfg", "configs/replknet_nano.yaml", "-opts", "MODEL.NUM_CLASSES", "3")
    assert "train_list.txt, line 2: label 7 is outside [0, 3); MODEL.NUM_CLASSES" in out


def test_lists_of_label_images_are_checked_as_segmentation_reads_them(tmp_path, capsys):
    make_shapes(str(tmp_path), count=20)
    arguments = [str(tmp_path), "-workers", "2"]
    config = ["-cfg", "configs/upernet_nano_shapes.yaml"]
    for more in ([], config):
        assert check_data_command([*arguments, *more]) == 0
        out = capsys.readouterr().out
        assert "train_list.txt: 16 images of 4 classes\n" in out
        assert out.endswith("No problems found\n")
    Image.new("L", (65, 64)).save(tmp_path / "labels" / "0001.png")
    Image.new("L", (64, 64), 9).save(tmp_path / "labels" / "0002.png")
    write(tmp_path / "labels" / "0003.png", (tmp_path / "labels" / "0003.png").read_bytes()[:90])
    (tmp_path / "images" / "0004.png").unlink()
    for name in ("0000", "0005", "0010", "0015"):  # all of validation
        Image.new("L", (64, 64), 0).save(tmp_path / "labels" / f"{name}.png")
    with open(tmp_path / "val_list.txt", "a") as file:
        file.write("images/0006.png\n")
    for more in ([], config):
        assert (
            check_data_command(
                [*arguments, *more, "-output", str(tmp_path / "r.json"), "-overwrite"]
            )
            == 1
        )
        report = json.loads((tmp_path / "r.json").read_text())
        found = [(p["kind"], p["line"], p["path"]) for p in report["problems"]]
        assert found == [
            ("undecodable", 1, "images/0001.png"),
            ("undecodable", 2, "images/0002.png"),
            ("truncated", 3, "images/0003.png"),
            ("missing", 4, "images/0004.png"),
            ("line", 5, "images/0006.png"),
            *[("no validation", 0, "")] * 3,
        ]
        messages = [p["message"] for p in report["problems"]]
        assert messages[0].startswith("cannot read labels/0001.png: the label image has 65 x 64")
        assert "4096 label pixels are of no class, the first is 9" in messages[1]
    (tmp_path / "class_names.txt").unlink()
    assert check_data_command(arguments) == 2
    assert "give -num_classes or -cfg" in capsys.readouterr().err


def test_paths_with_backslashes_are_named_so(tmp_path, capsys):
    image_tree(tmp_path, ["a/1.jpg", "a/2.jpg"])
    (tmp_path / "train_list.txt").write_text("a\\1.jpg 0\n")
    (tmp_path / "val_list.txt").write_text("a/2.jpg 0\n")
    assert check_data_command([str(tmp_path)]) == 1
    assert "no such file or directory; folders are separated by /" in capsys.readouterr().out


def test_folders_of_one_name_and_two_labels_are_one_problem_each(tmp_path):
    """Lists that were numbered each for itself, where one of them lacks the first class. A name
    may be composed in one list and decomposed in the other."""
    house = "Geb\u00e4ude"
    train = ["train/cat/0.jpg", f"train/{house}/1.jpg", f"train/{house}/2.jpg", "train/x/3.jpg"]
    val = ["val/Geba\u0308ude/4.jpg", "val/x/5.jpg", "val/x/6.jpg", "val/7.jpg", "val/8.jpg"]
    image_tree(tmp_path, train + val)
    for name, paths, labels in (("train", train, [0, 1, 1, 2]), ("val", val, [0, 1, 1, 0, 1])):
        lines = [f"{path} {label}\n" for path, label in zip(paths, labels)]
        (tmp_path / f"{name}_list.txt").write_text("".join(lines))
    problems = [p for p in check_data(str(tmp_path))["problems"] if p["kind"] == "shifted"]
    assert [(p["path"], p["message"]) for p in problems] == [
        (house, f"the folder {house} has label 0, and 1 in train_list.txt"),
        ("x", "the folder x has label 1, and 2 in train_list.txt"),
    ]


def test_storage_that_fails_says_nothing_about_the_data(tmp_path, monkeypatch, capsys):
    image_tree(tmp_path, ["train/a/0.jpg", "val/a/1.jpg"])
    make_lists(str(tmp_path), train="train", val="val")
    fault = faulty_storage.on("0.jpg", faulty_storage.fail())
    faulty_storage.patch_open(fault, monkeypatch, pauses=(0.01,))
    assert check_data_command([str(tmp_path), "-workers", "1"]) == 2
    assert "input/output error, in 2 attempts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["nowhere"], [".", "-num_classes", "0"], [".", "-workers", "0"]]
)
def test_command_line_that_cannot_check_exits_2(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert check_data_command(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_paths_outside_can_be_allowed(tmp_path):
    write(tmp_path / "outside.jpg", picture(0))
    write(tmp_path / "data" / "a.jpg", picture(1))
    absolute = os.path.abspath(tmp_path / "outside.jpg")
    (tmp_path / "data" / "train_list.txt").write_text(f"a.jpg 0\n../outside.jpg 0\n{absolute} 0\n")
    write(tmp_path / "data" / "b.jpg", picture(2))
    (tmp_path / "data" / "val_list.txt").write_text("b.jpg 0\n")
    for allow, wrong in ((False, 2), (True, 0)):
        report = check_data(str(tmp_path / "data"), allow_outside=allow)
        assert len(report["problems"]) == wrong


def test_one_absurd_label_makes_no_million_classes(tmp_path):
    image_tree(tmp_path, ["train/a/1.jpg", "train/b/1.jpg"])
    lines = "train/a/1.jpg 0\ntrain/b/1.jpg 99999999999\ntrain/b/1.jpg 123456789012345678901\n"
    (tmp_path / "train_list.txt").write_text(lines)
    report = check_data(str(tmp_path))
    assert report["num_classes"] == 3
    wrong = [(p["line"], p["kind"]) for p in report["problems"] if p["kind"] == "label"]
    assert wrong == [(2, "label"), (3, "label")]
