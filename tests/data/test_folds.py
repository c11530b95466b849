"""Folds: the lists of `make-lists -folds`, and reading them by DATA.FOLD."""

import hashlib
import re

import numpy as np
import pytest
from data_sets import configured, image_tree
from tiny import command

from replknet_paddle.data.make_lists import choose_folds, split_lists
from replknet_paddle.deploy.quantize import calibration_set

make_lists, train = command("make-lists"), command("train")


def read(folder, name: str) -> dict[str, int]:
    lines = (folder / name).read_text().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines]
    assert len({path for path, _ in pairs}) == len(pairs)
    return {path: int(label) for path, label in pairs}


@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.parametrize("seed", range(8))
def test_folds_have_the_counts_of_scikit_learn(seed):
    """Of each class, and in all; some classes have fewer images than there are folds."""
    selection = pytest.importorskip("sklearn.model_selection")
    rng = np.random.default_rng(seed)
    folds, count = int(rng.integers(2, 8)), int(rng.integers(60, 200))
    labels = rng.choice(6, count, p=[0.5, 0.3, 0.1, 0.06, 0.03, 0.01])
    ours = choose_folds(labels.tolist(), [[i] for i in range(count)], folds=folds, seed=seed)
    assert list(ours) == list(range(1, folds + 1))

    def counts(parts) -> list[list[int]]:
        each = np.array([np.bincount(labels[part], minlength=6) for part in parts])
        return np.sort(each, axis=0).tolist(), sorted(each.sum(axis=1).tolist())

    theirs = [val for _, val in selection.StratifiedKFold(folds).split(labels, labels)]
    assert counts(map(list, ours.values())) == counts(theirs)


@pytest.mark.parametrize("seed", range(4))
def test_each_image_is_validated_on_once_and_identical_files_together(tmp_path, seed):
    """Many copies, also across classes; by an independent digest."""
    rng = np.random.default_rng(seed)
    for i in range(60):
        path = tmp_path / f"class {i % 3}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([int(rng.integers(25))]) * int(rng.integers(1, 3)))
    written = split_lists(str(tmp_path), folder=".", folds=4, seed=seed)
    assert len(written) == 9 and written["class_names.txt"] == 3
    everything = {
        str(p.relative_to(tmp_path)): int(p.parent.name[-1]) for p in tmp_path.rglob("*.jpg")
    }
    validated = {}
    for k in range(1, 5):
        on, off = read(tmp_path, f"val_list_{k}.txt"), read(tmp_path, f"train_list_{k}.txt")
        assert not on.keys() & validated.keys() and on and off
        assert on | off == everything and not on.keys() & off.keys()
        digests = [
            {hashlib.md5((tmp_path / p).read_bytes()).digest() for p in s} for s in (on, off)
        ]
        assert not digests[0] & digests[1]
        validated |= on
    assert validated == everything
    for other_seed in (seed, seed + 1):
        before = [(tmp_path / name).read_bytes() for name in written]
        split_lists(str(tmp_path), folder=".", folds=4, seed=other_seed, overwrite=True)
        after = [(tmp_path / name).read_bytes() for name in written]
        assert (after == before) == (other_seed == seed)


@pytest.fixture
def folded(tmp_path, capsys, caplog):
    """A dataset in three folds, of which one class has a single image."""
    names = [f"{name}/{i}.jpg" for name in "abc" for i in range(12)]
    image_tree(tmp_path / "data", [*names, "d/0.jpg"])
    assert make_lists([str(tmp_path / "data"), "-folds=3"]) == 0
    assert caplog.messages == [
        f"1 class without a {kind} image (too few of its images differ): d"
        for kind in ("validation", "training")
    ]
    assert "val_list_3.txt: 12 lines\n" in capsys.readouterr().out
    return tmp_path / "data"


@pytest.mark.parametrize(
    "flags, says",
    [
        (["-folds=1"], "-folds is 1; allowed: from 2 to the 37 images that differ"),
        (["-folds=3", "-val=0.1"], "leave -val and -devkit out"),
        (["-folds=3", "-seed=-1"], "-seed -1; allowed: an integer >= 0"),
        (["-folds=3"], "train_list_1.txt is there; -overwrite replaces it"),
    ],
)
def test_what_cannot_become_folds_is_refused(folded, flags, says, capsys):
    before = {path: path.read_bytes() for path in folded.glob("*.txt")}
    assert make_lists([str(folded), *flags]) == 2
    assert says in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folded.glob("*.txt")} == before


def test_lists_of_more_folds_do_not_stay(folded):
    assert make_lists([str(folded), "-folds=2", "-overwrite"]) == 0
    assert len(list(folded.glob("*_list_*.txt"))) == 4
    (folded / "train_list_1.txt").rename(folded / "train_list_9.txt")
    (folded / "val_list_1.txt").unlink()
    assert make_lists([str(folded), "-folds=1"]) == make_lists([str(folded), "-folds=2"]) == 2
    assert (folded / "train_list_9.txt").exists()


def test_a_fold_is_trained_checked_and_evaluated_by_its_lists(
    folded, tiny_config_file, tmp_path, capsys
):
    run = tmp_path / "run"
    words = [f"-cfg={tiny_config_file}", f"-data_path={folded}", f"-output={run}", "-nproc=1"]
    assert train([*words, "-fold=2", "-epochs=2"]) == 0
    images = len(read(folded, "val_list_2.txt"))
    top1 = re.search(r"best: .*top-1 ([\d.]+ %), in", "".join(capsys.readouterr()))[1]
    assert command("eval")([str(run), f"-data_path={folded}", "-nproc=1"]) == 0
    assert re.search(rf"top-1 {top1} \(\d+/{images}\)", "".join(capsys.readouterr()))
    assert command("check-data")([str(folded), "-fold=2", "-workers=1"]) in (0, 1)
    assert f"val_list_2.txt: {images} images of 4 classes" in capsys.readouterr().out
    config = configured(tiny_config_file, folded, fold=2)
    assert calibration_set(config).list_file == str(folded / "train_list_2.txt")
    # Data without that fold, and the way out that the message names.
    for path in folded.glob("*_list_2.txt"):
        path.rename(str(path).replace("_2", ""))
    assert command("eval")([str(run), f"-data_path={folded}", "-nproc=1"]) == 2
    said = capsys.readouterr().err
    assert "val_list_2.txt for DATA.FOLD 2; " in said and "-opts DATA.FOLD None reads" in said
    words = [str(run), f"-data_path={folded}", "-nproc=1", "-opts", "DATA.FOLD", "None"]
    assert command("eval")(words) == 0
    assert f"top-1 {top1}" in "".join(capsys.readouterr())
