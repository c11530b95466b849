"""Checking datasets with every kind of damage."""

import json
import os

import faulty_storage
import numpy as np
import pytest
from data_sets import image_tree, picture, write
from PIL import Image
from tiny import command

from replknet_paddle.data.check_data import KINDS, check_data
from replknet_paddle.data.make_lists import make_lists

check_data_command = command("check-data")


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
    # Class 2 has no training image, class 3 no validation image, and `odd` another label there.
    expected = [("empty class", "train_list.txt", 0)]
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
    assert {kind for kind, _, _ in found} == set(KINDS)
    assert report["counts"] == {kind: [k for k, _, _ in found].count(kind) for kind in KINDS}
    assert report["lists"]["val_list.txt"]["images_per_class"] == [4, 1, 0, 0, 1]
    messages = {(problem["kind"], problem["message"]) for problem in report["problems"]}
    copied = "class 3; the same bytes have class 0 in line 1 of train_list.txt"
    assert {("conflict", copied), ("overlap", "also in line 1 of train_list.txt")} <= messages
    assert ("no validation", "class 3 has no image, and 2 in training") in messages
    (tmp_path / "data" / "val_list.txt").unlink()
    kinds = check_data(str(tmp_path / "data"), num_classes=5)["counts"]
    assert not any(kinds[kind] for kind in ("overlap", "no validation", "shifted"))


def test_command_line_reports_and_says_so_by_its_status(tmp_path, capsys):
    damaged(tmp_path / "data")
    report = tmp_path / "report.json"
    arguments = [str(tmp_path / "data"), "-num_classes", "5", "-workers", "1"]
    assert check_data_command([*arguments, "-report", str(report)]) == 1
    assert len(json.loads(report.read_text())["problems"]) == 21
    out = capsys.readouterr().out
    assert "train_list.txt, line 3: line: " in out and out.endswith("Problems found: 21\n")

    image_tree(tmp_path / "good", ["train/a/0.jpg"])
    image_tree(tmp_path / "good", ["other/b/0.jpg", "val/a/1.jpg"])
    make_lists(str(tmp_path / "good"), train="train", val="val")
    assert check_data_command([str(tmp_path / "good"), "-workers", "1"]) == 0
    assert capsys.readouterr().out.endswith("No problems found\n")


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
        (house, "label 0, and 1 in train_list.txt"),
        ("x", "label 1, and 2 in train_list.txt"),
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
