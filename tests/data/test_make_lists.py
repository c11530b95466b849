"""Writing list files: from a folder for each part, or from one tree that is split (-val SHARE)."""

import errno
import hashlib
import logging
import os
import shutil
from collections import Counter

import faulty_storage
import numpy as np
import pytest
from data_sets import image_tree
from tiny import command

from replknet_paddle.data.make_lists import choose_validation, make_lists, read_synsets, split_lists
from replknet_paddle.deploy.images import ImageFiles
from replknet_paddle.runtime.errors import InputError

main = command("make-lists")


def read(folder, split: str) -> list[tuple[str, int]]:
    lines = (folder / f"{split}_list.txt").read_text().splitlines()
    return [(line.rsplit(" ", 1)[0], int(line.rsplit(" ", 1)[1])) for line in lines]


def test_lists_of_folder_trees_number_the_sorted_classes(tmp_path):
    image_tree(
        tmp_path,
        ["train/dog/2.JPG", "train/dog/10.jpg", "train/Cat/sub folder/a.png", "train/ant/b.webp"]
        + ["val/dog/1.jpeg", "train/dog/notes.txt", "train/dog/.hidden.jpg", "train/.git/x.jpg"],
    )
    written = make_lists(str(tmp_path), train="train", val="val")
    assert written == {"train_list.txt": 4, "val_list.txt": 1, "class_names.txt": 3}
    assert read(tmp_path, "train") == [
        ("train/Cat/sub folder/a.png", 0),
        ("train/ant/b.webp", 1),
        ("train/dog/10.jpg", 2),
        ("train/dog/2.JPG", 2),
    ]
    assert read(tmp_path, "val") == [("val/dog/1.jpeg", 2)]
    assert (tmp_path / "class_names.txt").read_text().splitlines() == ["Cat", "ant", "dog"]


def imagenet(folder, *, compressed: bool):
    """ImageNet's layout with three classes, whose IDs are not in the order of their synsets."""
    io = pytest.importorskip("scipy.io")
    data, kit = folder / "imagenet", folder / "kit" / "data"
    image_tree(data, [f"train/{name}/{name}_1.JPEG" for name in ("n03", "n01", "n02")])
    image_tree(data, [f"val/ILSVRC2012_val_0000000{i}.JPEG" for i in range(1, 5)])
    kit.mkdir(parents=True)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n1\n2\n1\n")
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("hist", object)]
    synsets = np.array(
        [(1, "n02", "kit fox, Vulpes", np.arange(3.0)), (2, "n03", "setter", np.arange(2))]
        + [(3, "n01", "x", np.zeros(0)), (1001, "n99", "an inner node", np.zeros(1))],
        dtype=fields,
    ).reshape(4, 1)
    io.savemat(kit / "meta.mat", {"synsets": synsets}, do_compression=compressed)
    return data, folder / "kit"


@pytest.mark.parametrize("compressed", [True, False])
def test_ground_truth_becomes_labels_in_the_order_of_the_synsets(tmp_path, compressed):
    data, kit = imagenet(tmp_path, compressed=compressed)
    written = make_lists(str(data), train="train", val="val", devkit=str(kit))
    assert written == {"train_list.txt": 3, "val_list.txt": 4, "class_names.txt": 3}
    # The ground truth says 3, 1, 2, 1: n01, n02, n03, n02.
    assert [label for _, label in read(data, "val")] == [0, 1, 2, 1]
    assert read(data, "train")[0] == ("train/n01/n01_1.JPEG", 0)


@pytest.mark.parametrize("seed", range(20))
def test_damaged_meta_is_refused(tmp_path, seed):
    _, kit = imagenet(tmp_path, compressed=seed % 2 == 0)
    rng, meta = np.random.default_rng(seed), kit / "data" / "meta.mat"
    content = bytearray(meta.read_bytes())
    for _ in range(50):
        content[rng.integers(128, len(content))] = rng.integers(256)
    meta.write_bytes(content[: rng.integers(100, len(content))])
    with pytest.raises(InputError, match="not the meta.mat"):
        read_synsets(str(meta))


def test_what_cannot_become_a_list_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="train"):
        make_lists(str(tmp_path), train="train", val="val")
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "val" / "a").mkdir(parents=True)
    with pytest.raises(InputError, match="no images"):
        make_lists(str(tmp_path), train="train", val="val")
    image_tree(tmp_path, ["train/tulip/1.jpg", "val/a/1.jpg", "val/tulp/1.jpg"])
    shutil.rmtree(tmp_path / "val" / "a")
    with pytest.raises(InputError, match=r"val/tulp: no such class .*; did you mean tulip\?"):
        make_lists(str(tmp_path), train="train", val="val")
    image_tree(tmp_path, ["train/a/line\nbreak.jpg"])
    with pytest.raises(InputError, match="line breaks"):
        make_lists(str(tmp_path), train="train", val="train")
    assert not list(tmp_path.glob("*.txt*"))


@pytest.mark.parametrize(
    "name", [b"\xc4\xe3", b"caf\xe9", "a\u2028b".encode(), "a\x85b".encode(), b"a\x0bb", b"cat "]
)
def test_class_names_that_cannot_be_read_back_are_refused_by_name(tmp_path, capsys, name):
    """Folders in GBK or Latin-1, with separators of lines that are no line feeds, with blanks."""
    name = os.fsdecode(name)
    for split in ("train", "val"):
        make_tree(tmp_path / split, {name: 1, "other": 1})
    assert main([str(tmp_path)]) == 2
    assert ascii(name) in capsys.readouterr().err
    assert not list(tmp_path.glob("*.txt*"))


JUNK = [
    *("__MACOSX/cat/._1.jpg", "cat/.ipynb_checkpoints/1.jpg", "@eaDir/1.jpg", "cat/@eaDir/1.jpg"),
    *("cat/._1.jpg", "cat/Thumbs.db", "cat/desktop.ini", ".DS_Store", "cat/.DS_Store"),
]


def test_what_systems_leave_in_folders_and_empty_folders_are_no_images_and_no_classes(
    tmp_path, caplog
):
    """As `predict` has it, which searches folders by the same function."""
    image_tree(tmp_path, ["cat/1.jpg", "cat/deep/2.jfif", "dog/3.JPE", "dog/4.pgm"])
    for name in [*JUNK, "dog/5.heic", "dog/6.heic", "dog/a note.txt", "texts/README"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "nothing").mkdir()
    image_tree(tmp_path, ["beside.jpg"])
    files = ImageFiles([str(tmp_path)])
    images = [os.path.relpath(path, tmp_path) for path, _ in files]
    images.remove("beside.jpg")
    with caplog.at_level(logging.WARNING):
        split_lists(str(tmp_path), folder=".", share=0.5)
    assert sorted(path for split in ("train", "val") for path, _ in read(tmp_path, split)) == images
    assert images == ["cat/1.jpg", "cat/deep/2.jfif", "dog/3.JPE", "dog/4.pgm"]
    assert (tmp_path / "class_names.txt").read_text() == "cat\ndog\n"
    beside, left_out, passed_over = caplog.messages
    assert beside == f"1 image in {tmp_path} beside the folders of the classes: in no list"
    assert left_out == "2 folders without an image, left out: nothing, texts"
    said = "passed over 4 files not named as images are (2 .heic, 1 .txt, 1 without a suffix)"
    assert passed_over == said
    assert files.passed_over == {".heic": 2, ".txt": 1, "without a suffix": 1}


def test_empty_folders_of_synsets_keep_their_number(tmp_path, caplog):
    """That of the published weights."""
    image_tree(tmp_path, ["train/n00000001/1.jpg", "train/n00000003/2.jpg", "val/n00000003/3.jpg"])
    (tmp_path / "train" / "n00000002").mkdir()
    with caplog.at_level(logging.WARNING):
        make_lists(str(tmp_path), train="train", val="val")
    assert read(tmp_path, "val") == [("val/n00000003/3.jpg", 2)]
    assert caplog.messages == [
        "1 folder without an image, kept as classes: n00000002",
        "1 class without a validation image: n00000001",
    ]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    image_tree(tmp_path, ["train/a/1.jpg", "train/a/closed/2.jpg", "val/a/3.jpg"])
    faults = faulty_storage.on("closed", faulty_storage.fail(errno.EACCES))
    monkeypatch.setattr(os, "scandir", faulty_storage.faulty(os.scandir, faults))
    with pytest.raises(InputError, match="closed: cannot list the folder: Permission denied"):
        make_lists(str(tmp_path), train="train", val="val")


def test_command_line_replaces_lists_only_when_reported(tmp_path, capsys):
    image_tree(tmp_path, ["train/a/1.jpg", "val/a/1.jpg"])
    assert main([str(tmp_path)]) == 0
    assert "train_list.txt: 1 line\n" in capsys.readouterr().out
    assert main([str(tmp_path)]) == 2
    assert "-overwrite" in capsys.readouterr().err
    assert main([str(tmp_path), "-overwrite"]) == 0
    assert main([str(tmp_path / "nothing")]) == 2


def make_tree(folder, counts: dict[str, int], *, order=1):
    """Class folders with so many files of different content each."""
    names = [f"{name}/{i}.jpg" for name, count in counts.items() for i in range(count)]
    for name in names[::order]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.fsencode(name))


def test_each_class_gives_its_share_and_every_image_is_on_one_side(tmp_path, capsys):
    counts = {"ähre": 100, "bär 熊": 25, "c": 10, "d": 4, "e": 2}
    make_tree(tmp_path, counts)
    assert main([str(tmp_path), "--val", "0.1"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"wrote {tmp_path}/train_list.txt: 125 lines",
        f"wrote {tmp_path}/val_list.txt: 16 lines",
    ]
    train, val = read(tmp_path, "train"), read(tmp_path, "val")
    names = (tmp_path / "class_names.txt").read_text(encoding="utf-8").splitlines()
    assert names == sorted(counts)
    in_val = Counter(names[label] for _, label in val)
    assert in_val == {"ähre": 10, "bär 熊": 3, "c": 1, "d": 1, "e": 1}
    assert all(path.startswith(f"{names[label]}/") for path, label in train + val)
    everything = [path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*.jpg")]
    assert sorted(path for path, _ in train + val) == sorted(everything)


def test_the_choice_follows_the_seed_and_not_the_file_system(tmp_path):
    seen = []
    for folder, order, seed in (("a", 1, 0), ("b", -1, 0), ("c", 1, 1)):
        make_tree(tmp_path / folder, {"x": 40, "y": 40}, order=order)
        split_lists(str(tmp_path / folder), folder=".", share=0.25, seed=seed)
        seen.append(read(tmp_path / folder, "val"))
    assert seen[0] == seen[1] != seen[2] and len(seen[2]) == 20
    first = split_lists(str(tmp_path / "a"), folder=".", share=0.25, overwrite=True)
    assert read(tmp_path / "a", "val") == seen[0] and first["val_list.txt"] == 20


@pytest.mark.parametrize("seed", range(6))
def test_identical_files_are_never_on_both_sides(tmp_path, seed):
    """Many copies, also across classes, under random shares; by an independent digest."""
    rng = np.random.default_rng(seed)
    for i in range(60):
        path = tmp_path / f"class {i % 3}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([int(rng.integers(25))]) * int(rng.integers(1, 3)))
    written = split_lists(str(tmp_path), folder=".", share=float(rng.uniform(0.05, 0.6)), seed=seed)
    digests = {
        split: {hashlib.md5((tmp_path / path).read_bytes()).digest() for path, _ in lines}
        for split in ("train", "val")
        for lines in [read(tmp_path, split)]
    }
    assert not digests["train"] & digests["val"]
    assert written["train_list.txt"] + written["val_list.txt"] == 60
    assert {label for _, label in read(tmp_path, "train")} == {0, 1, 2}


@pytest.mark.parametrize(
    "groups, labels, share, expected",
    [
        ([[0]], [0], 0.5, [0]),  # an only image trains
        ([[0, 1]], [0, 0], 0.5, [0]),  # as do copies of an only image
        ([[0], [1]], [0, 0], 0.01, [1]),
        ([[0], [1]], [0, 0], 0.99, [1]),
        ([[0, 1], [2, 3]], [0] * 4, 0.1, [2]),  # rather too many than none
        ([[0, 1], [2], [3]], [0, 1, 0, 1], 0.5, [1, 1]),  # in two classes: it trains
    ],
)
def test_small_classes(groups, labels, share, expected):
    for seed in range(10):
        chosen = choose_validation(labels, groups, share=share, seed=seed)
        counts = Counter(labels[i] for i in chosen)
        assert [counts[label] for label in sorted(set(labels))] == expected
        assert all(chosen >= set(group) or not chosen & set(group) for group in groups)


def test_a_class_that_cannot_spare_an_image_is_named(tmp_path, caplog):
    make_tree(tmp_path, {"many": 10, "one": 1})
    with caplog.at_level(logging.WARNING):
        split_lists(str(tmp_path), folder=".", share=0.1)
    [record] = caplog.records
    said = "1 class without a validation image (too few of its images differ): one"
    assert record.getMessage() == said


def test_the_classes_may_be_in_a_folder_below(tmp_path, capsys):
    make_tree(tmp_path / "images", {"a": 4, "b": 4})
    assert main([str(tmp_path), "--val", "0.25"]) == 2
    assert "the only class; if the classes are in it, add -train images" in capsys.readouterr().err
    assert main([str(tmp_path), "--val", "0.25", "--train", "images"]) == 0
    assert all(path.startswith("images/") for path, _ in read(tmp_path, "val"))


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-0.1", "nan"])
def test_shares_outside_the_interval_are_refused(tmp_path, capsys, share):
    make_tree(tmp_path, {"a": 4, "b": 4})
    assert main([str(tmp_path), f"--val={share}"]) == 2
    assert "a share between 0 and 1" in capsys.readouterr().err
    assert not (tmp_path / "train_list.txt").exists()


def test_a_folder_may_have_a_number_for_a_name(tmp_path):
    for name in ("train/a", "0.5/a"):
        make_tree(tmp_path / name.split("/")[0], {"a": 2})
    assert main([str(tmp_path), "--val", "0.5"]) == 0
    assert [path for path, _ in read(tmp_path, "val")] == ["0.5/a/0.jpg", "0.5/a/1.jpg"]
