"""What a checkpoint knows of its classes, and data that disagree with it."""

import shutil

import numpy as np
import pytest
import yaml
from harness import copy_run, finish
from tiny import TINY, command, flags, make_data

from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile
from replknet_paddle.checkpoints.files import read_checkpoint
from replknet_paddle.config import get_config
from replknet_paddle.data.class_names import name_differences
from replknet_paddle.deploy import Predictor
from replknet_paddle.engine.start import report_absent_classes

NAMES = ["Mäuse", "猫", "dogs and wolves", "🐟"]


@pytest.fixture(scope="module")
def named_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    make_data(folder, train=16, val=12)
    write_names(folder, NAMES)
    return folder


@pytest.fixture(scope="module")
def open_config(tmp_path_factory):
    """A configuration that leaves the number of classes to the data."""
    tree = yaml.safe_load(TINY)
    tree["MODEL"]["NUM_CLASSES"] = None
    tree["TRAIN"] |= {"NUM_EPOCHS": 1, "ACCUM_ITER": 1}
    path = tmp_path_factory.mktemp("configs") / "open.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def trained(named_data, open_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    finish([f"-cfg={open_config}", f"-data_path={named_data}", f"-output={folder / 'run'}"])
    return folder / "run"


@pytest.fixture
def start(tmp_path):
    """Starts a run into the folder `run` with these flags; returns what it prints."""

    def run(*flags, status=0) -> str:
        return finish([f"-output={tmp_path / 'run'}", *flags], status=status)

    return run


def write_names(folder, names) -> None:
    (folder / "class_names.txt").write_text("".join(f"{name}\n" for name in names), "utf-8")


def test_the_data_give_the_number_and_the_names(trained):
    assert get_config(trained / "config.yaml").MODEL.NUM_CLASSES == 4
    assert (trained / "class_names.txt").read_text("utf-8").splitlines() == NAMES
    classes = CheckpointFile(trained / "best").classes
    assert classes.count == 4 and classes.names == tuple(NAMES)


def test_without_names_the_largest_label_counts(open_config, start, tmp_path):
    make_data(tmp_path / "data", train=24, val=14, classes=7)
    said = start(f"-cfg={open_config}", f"-data_path={tmp_path / 'data'}")
    assert "MODEL.NUM_CLASSES is None: 7 classes" in said
    classes = CheckpointFile(tmp_path / "run" / "last").classes
    assert (classes.count, classes.names) == (7, None)
    assert not (tmp_path / "run" / "class_names.txt").exists()


@pytest.fixture
def other_data(named_data, tmp_path):
    """A copy of the data; names: those that its class_names.txt then has."""

    def copy(names):
        folder = tmp_path / "other"
        shutil.copytree(named_data, folder)
        (folder / "class_names.txt").unlink()
        if names is not None:
            write_names(folder, names)
        return folder

    return copy


@pytest.mark.parametrize("what", ["-eval", "-resume"])
@pytest.mark.parametrize(
    "names, says",
    [
        (["猫", "Mäuse", *NAMES[2:]], "  class 0: 'Mäuse' and '猫'\n  class 1: '猫' and 'Mäuse'\n"),
        ([*NAMES, "birds"], "  4 classes and 5\n  class 4: none and 'birds'\n"),
    ],
)
def test_other_names_are_an_error_that_lists_them(
    trained, other_data, start, tmp_path, what, names, says
):
    folder = other_data(names)
    flags = [f"-resume={trained}"] if what == "-resume" else ["-eval", f"-pretrained={trained}"]
    said = start(*flags, f"-data_path={folder}", "-opts", "TRAIN.NUM_EPOCHS", 2, status=2)
    assert f"are not those of {folder / 'class_names.txt'}:\n{says}" in said
    assert "Traceback" not in said and not (tmp_path / "run").exists()


def test_names_of_the_checkpoint_win(trained, other_data, tmp_path):
    moved = copy_run(trained, tmp_path / "moved")
    # The data folder of the run gets other names later, and other data have none at all.
    settings = yaml.safe_load((moved / "config.yaml").read_text())
    settings["DATA"]["DATA_PATH"] = str(other_data(["a", "b", "c", "d"]))
    (moved / "config.yaml").write_text(yaml.safe_dump(settings))
    assert Predictor(str(moved / "best"), backend="eager").class_names == NAMES
    merged = tmp_path / "merged.safetensors"
    assert command("merge")([str(moved / "best"), "-output", str(merged)]) == 0
    settings["MODEL"]["SMALL_KERNEL_MERGED"] = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert Predictor(str(merged), backend="eager").class_names == NAMES


def test_a_file_that_the_user_names_wins_over_the_checkpoint(trained, tmp_path):
    write_names(tmp_path, ["mice", "cats", "dogs", "fish"])
    config = get_config(
        trained / "config.yaml", DATA__CLASS_NAMES=str(tmp_path / "class_names.txt")
    )
    predictor = Predictor(str(trained / "best"), backend="eager", config=config)
    assert predictor.class_names == ["mice", "cats", "dogs", "fish"]


@pytest.mark.parametrize("drop_head", [False, True])
def test_fine_tuning_on_as_many_other_classes(
    trained, other_data, open_config, start, tmp_path, drop_head
):
    said = start(
        *(f"-cfg={open_config}", f"-data_path={other_data(['a', 'b', 'c', 'd'])}"),
        *(f"-pretrained={trained / 'best'}", "-opts", "MODEL.DROP_HEAD", drop_head),
        *("MODEL.PRETRAINED_WEIGHTS", "model"),
        # Weights that stay as they are loaded.
        *("TRAIN.BASE_LR", 0, "TRAIN.END_LR", 0, "TRAIN.WARMUP_START_LR", 0),
        status=0 if drop_head else 2,
    )
    if not drop_head:
        assert "class 0: 'Mäuse' and 'a'" in said and "MODEL.DROP_HEAD True" in said
        return
    assert "the head of " in said and "is not loaded" in said
    before, after = map(read_checkpoint, (trained / "best", tmp_path / "run" / "last"))
    for name, is_kept in (("head.weight", False), ("stem.0.conv.weight", True)):
        assert np.array_equal(before[f"model.{name}"], after[f"model.{name}"]) == is_kept
    assert CheckpointFile(tmp_path / "run" / "last").classes.names == ("a", "b", "c", "d")


def test_lists_that_do_not_fit_the_head_or_each_other_are_reported_before_training(
    tiny_data, start, tmp_path, tiny_config_file
):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    shifted = [line.rsplit(" ", 1) for line in (data / "val_list.txt").read_text().splitlines()]
    text = "".join(f"{path} {(int(label) + 1) % 4}\n" for path, label in shifted)
    (data / "val_list.txt").write_text(text)
    options = ["-opts", "MODEL.NUM_CLASSES", 6, "TRAIN.NUM_EPOCHS", 1]
    said = start(f"-cfg={tiny_config_file}", f"-data_path={data}", *options)
    before = said[: said.index("epoch 1/1, batch")]
    absent = "has no label of 2 of the 6 classes (MODEL.NUM_CLASSES): 4, 5\n"
    for name in ("train_list.txt", "val_list.txt"):
        assert f"{data / name} {absent}" in before
    assert "4 folders with another label in" in before
    assert "class 0: 0 and 1; class 1: 1 and 2" in before


def test_a_long_list_of_absent_classes_is_cut(caplog):
    names, labels = [f"name {i}" for i in range(1000)], np.array([0, 999, 999])

    def absent(count, **_):
        return sorted(set(range(count)) - set(labels.tolist()))

    dataset = flags(list_file="train_list.txt", absent_classes=absent)
    report_absent_classes(dataset, 1000, names)
    assert "no label of 998 of the 1000 classes" in caplog.text
    assert "1 (name 1), 2 (name 2)" in caplog.text and "10 (name 10) and 988 more" in caplog.text
    caplog.clear()
    labels = np.arange(3)
    report_absent_classes(dataset, 3, None)
    assert not caplog.text


def test_differences_of_names():
    assert name_differences(["a", "b"], ["a", "b"]) == []
    assert name_differences(["a", "b"], ["b", "b"]) == ["class 0: 'a' and 'b'"]
    lines = name_differences([str(i) for i in range(50)], ["x"] * 40)
    assert len(lines) == 11 and lines[0] == "50 classes and 40" and lines[-1] == "and 41 more"


def test_a_number_of_classes_is_needed_where_nothing_gives_one(open_config, capsys):
    assert command("model-info")([str(open_config)]) == 2
    assert "error: MODEL.NUM_CLASSES is None" in capsys.readouterr().err
