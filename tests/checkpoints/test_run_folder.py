"""Checkpoints of a run: whole or not there, resumed, linked, kept, and set aside."""

import copy
import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FIXTURES, ROOT

from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile, record_metadata
from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.checkpoints.run_folder import (
    Checkpoint,
    Progress,
    checkpoints,
    config_of,
    load_checkpoint,
    newest_whole_checkpoint,
    path_at,
    point_to,
    prepare_run_folder,
    remove_superseded,
    run_folder_of,
    save_checkpoint,
)
from replknet_paddle.runtime.errors import InputError

PROGRESS = Progress(
    epoch=3,
    batch=14,
    batches=20,
    step=37,
    best_score=100 / 3,
    epoch_sums=(0.1 + 0.2, 128.0),
    record={"epoch": 3, "train_loss": 0.1 + 0.2},
)


def example(progress=PROGRESS, seed=0) -> Checkpoint:
    rng = np.random.default_rng(seed)

    def tensors(**shapes):
        return {
            name.replace("_", "."): rng.normal(size=shape).astype("float32")
            for name, shape in shapes.items()
        }

    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38], "float32")
    return Checkpoint(
        config="SEED: 1\nMODEL:\n  NAME: tiny é\n",
        progress=progress,
        model={
            **tensors(stem_weight=(3, 3, 3, 3), stem_bias=(3,)),
            "odd": odd,
            "scalar": np.array(2.5, "float32"),
            "none": np.zeros((0, 4), "float32"),
            "turned": rng.normal(size=(4, 5)).astype("float32").T,
        },
        model_ema=tensors(stem_weight=(3, 3, 3, 3), stem_bias=(3,)),
        optimizer=tensors(stem_weight_moment1=(3, 3, 3, 3), stem_weight_beta1=(1,)),
        scaler={"scale": 32768.0, "incr_count": 3, "use_dynamic_loss_scaling": True},
    )


def save_at(run_folder, epoch, step) -> str:
    progress = replace(PROGRESS, epoch=epoch, step=step)
    path = path_at(str(run_folder), progress)
    os.makedirs(run_folder, exist_ok=True)
    save_checkpoint(path, example(progress, seed=step))
    return path


def assert_same(got: Checkpoint, wanted: Checkpoint) -> None:
    assert (got.config, got.progress, got.scaler) == (wanted.config, wanted.progress, wanted.scaler)
    for part in ("model", "model_ema", "optimizer"):
        left, right = getattr(got, part), getattr(wanted, part)
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].shape == right[name].shape, name
            assert left[name].dtype == right[name].dtype, name
            assert left[name].tobytes() == right[name].tobytes(), name


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


# ---- writing and reading


def test_everything_returns_bit_for_bit(tmp_path):
    path = str(tmp_path / "checkpoints" / "a.safetensors")
    save_checkpoint(path, example())
    got = load_checkpoint(path)
    assert_same(got, example())
    assert got.file.path == path
    assert isinstance(got.progress.epoch_sums, tuple)


def test_parts_that_a_run_does_not_have_are_empty(tmp_path):
    path = str(tmp_path / "a.safetensors")
    save_checkpoint(path, Checkpoint("SEED: 1", Progress(), {"w": np.ones(2, "float32")}))
    got = load_checkpoint(path)
    assert got.model_ema == {} and got.optimizer == {} and got.scaler == {}
    assert got.progress == Progress()


# ---- all or nothing

LIMITED = """
import resource, signal, sys
sys.path.insert(0, {root!r})
import numpy as np
from replknet_paddle.checkpoints.run_folder import Checkpoint, Progress, save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint({path!r}, Checkpoint("", Progress(), {{"w": np.ones(1_000_000, "float32")}}))
except OSError as error:
    sys.exit(str(error))
"""


def test_a_disk_that_really_takes_no_more_leaves_the_old_file(tmp_path):
    path = save_at(tmp_path, 1, 5)
    before = Path(path).read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(root=str(ROOT), path=path)],
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"cannot write {path}: File too large; 3.8 MiB are needed and ")
    assert "Earlier checkpoints are unchanged" in message
    assert Path(path).read_bytes() == before
    assert names(os.path.dirname(path)) == [os.path.basename(path)]


# ---- files that cannot be resumed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint, as bytes and as it is read."""
    path = save_at(tmp_path_factory.mktemp("whole"), 1, 5)
    return Path(path).read_bytes(), load_checkpoint(path)


def read_damaged(content: bytes, tmp_path_factory) -> Checkpoint | None:
    """What is read from a file of this content; None where it is refused by its name."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    try:
        return load_checkpoint(str(path))
    except InputError as error:
        assert str(path) in str(error)


@settings(max_examples=400, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), in_header=st.booleans(), bit=st.integers(0, 7))
def test_a_flipped_bit_gives_an_error_or_the_same(whole, tmp_path_factory, place, in_header, bit):
    content, wanted = whole
    end_of_header = 8 + int.from_bytes(content[:8], "little")
    start, end = (0, end_of_header) if in_header else (end_of_header, len(content))
    flipped = bytearray(content)
    flipped[start + int(place * (end - start))] ^= 1 << bit
    got = read_damaged(flipped, tmp_path_factory)
    if got is not None:
        assert_same(got, wanted)


@settings(max_examples=100, deadline=None)
@given(keep=st.floats(0, 1, exclude_max=True), zeros=st.booleans())
@case(0.0, False)  # an empty file
@case(0.0, True)  # what a power cut can leave where a file system writes data after names
@case(1 - 1e-9, False)
def test_a_cut_file_is_refused(whole, tmp_path_factory, keep, zeros):
    content, _ = whole
    cut = content[: int(keep * len(content))]
    assert read_damaged(cut + bytes(len(content) - len(cut)) * zeros, tmp_path_factory) is None


def rewrite(path: str, metadata) -> None:
    """Write a checkpoint with the `metadata` of its body and tensors, which that may change."""
    file = CheckpointFile(path)
    tensors = {name: np.array(value) for name, value in file.content.items()}
    write_safetensors(path, tensors, metadata(file.body, tensors))


@pytest.mark.parametrize("others", [{"body": "{}", "crc32": 0}, {"something": "else"}])
def test_a_newer_schema_is_named(tmp_path, others):
    path = save_at(tmp_path, 1, 5)
    record = json.dumps({"schema_version": 2, **others})
    rewrite(path, lambda *_: {"replknet_paddle": record})
    with pytest.raises(InputError, match="schema version 2.*reads version 1"):
        load_checkpoint(path)


GONE = "gone"

# With a right checksum: fields and values that a defect of another version could write.
WRONG_FIELDS = [
    *((field, GONE) for field in ("config", "progress", "scaler")),
    *(
        ("other", 1),
        ("config", 3),
        ("config", "a: ["),
        ("config", ""),
        ("progress", []),
        ("scaler", []),
    ),
    *(("scaler", {"scale": "x"}), ("class_names", "abc"), ("class_names", [1, 2])),
    *((f"progress.{key}", GONE) for key in ("epoch", "step", "best_score", "epoch_sums")),
    *(("progress.other", 1), ("progress.step", -1), ("progress.best_score", None)),
    *(("progress.epoch", value) for value in ("1", 1.5, True)),
    *(("progress.better_weights", value) for value in ("best", [])),
    *(("progress.epoch_sums", value) for value in ([1.0], 3)),
    *(("progress.best_checkpoint", 1), ("progress.record", [])),
    *(("progress.best_checkpoint", name) for name in ("../../config.yaml", "\ud800", "a.pth")),
    *(("progress.best_score", value) for value in (float("nan"), float("inf"), 101)),
    *(("progress.batch", value) for value in (20, 10**30)),
    *(("progress.record", value) for value in ({"epoch": 1, "a": "x"}, {"a": 1}, {"epoch": "1"})),
    *(("scaler", {"incr_count": 3, "scale": value}) for value in (0, float("inf"), float("nan"))),
    *(("scaler", {"scale": 2.0, "incr_count": value}) for value in (-1, 1.5)),
    *(("scaler", {"scale": 2.0}), ("scaler", {"incr_count": 3}), ("class_names", ["\ud800"])),
    *(("config", f"MODEL: {{NUM_CLASSES: {count}}}") for count in ("x", -1, 1.5, ".inf", "[1]")),
    *(("config", text) for text in ("MODEL: {TYPE: 3}", "DATA: {CLASS_NAMES: [a]}")),
    *(("convolutions", value) for value in (None, [], "x", {"1x4x9x9, kernel 9, float32": 1})),
    ("tensors.other", np.ones(1, "f4")),
]


@pytest.mark.parametrize("field, value", WRONG_FIELDS)
def test_wrong_fields_are_damage_and_the_checkpoint_before_it_is_resumed(
    tmp_path, caplog, field, value
):
    older, path = save_at(tmp_path, 1, 5), save_at(tmp_path, 2, 10)

    def wrong(body, tensors):
        section, _, key = field.rpartition(".")
        fields = {"": body, "progress": body["progress"], "tensors": tensors}[section]
        fields[key] = value
        if value is GONE:
            del fields[key]
        return record_metadata(body, tensors)

    rewrite(path, wrong)
    with pytest.raises(InputError, match=f"{path} is damaged: its metadata"):
        load_checkpoint(path)
    assert newest_whole_checkpoint(str(tmp_path)).file.path == older
    assert "trying the one before it" in caplog.text


def places(node, path=()):
    """Keys and indices that lead to each value in nested dictionaries and lists."""
    yield path
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield from places(node[key], (*path, key))


def test_every_field_that_is_missing_or_has_another_type_is_damage(tmp_path):
    path = save_at(tmp_path, 2, 10)
    original = {**CheckpointFile(path).body, "class_names": ["a", "b"]}
    others = ["x", 1.5, -1, True, None, [], ["x"], {}, {"x": 1}, float("nan"), GONE]
    taken = set()
    for place in filter(None, places(original)):
        for value in others:
            body = copy.deepcopy(original)
            *above, key = place
            node = functools.reduce(lambda node, key: node[key], above, body)
            before, node[key] = node[key], value
            if value is GONE:
                del node[key]
            rewrite(path, lambda _, tensors, body=body: record_metadata(body, tensors))
            try:
                load_checkpoint(path)
            except InputError as error:
                assert "is damaged: its metadata" in str(error)
            else:
                like = (float, int) if type(before) is float else (type(before),)
                if value is GONE or type(value) not in like:
                    taken.add((place, repr(value)))
    assert taken == {
        *((("class_names",), repr(value)) for value in (None, GONE)),
        (("convolutions",), repr(GONE)),
        *((("progress", name), repr(GONE)) for name in ("better_weights", "record")),
        (("progress", "record", "train_loss"), repr(GONE)),
        *((("class_names", i), repr(GONE)) for i in range(2)),
        (("scaler", "use_dynamic_loss_scaling"), repr(GONE)),  # of version 0.1
        *((("scaler", "use_dynamic_loss_scaling"), value) for value in ("1.5", "-1", "nan")),
    }


def test_checkpoints_of_version_0_1_are_resumed(tmp_path):
    path = save_at(tmp_path, 2, 10)

    def as_version_0_1(body, tensors):
        del body["class_names"], body["convolutions"]
        del body["progress"]["better_weights"], body["progress"]["record"]
        body["progress"]["best_top1_percent"] = body["progress"].pop("best_score")
        return record_metadata(body, tensors)

    wanted = load_checkpoint(path).progress
    rewrite(path, as_version_0_1)
    assert load_checkpoint(path).progress == replace(wanted, record={})


@pytest.mark.parametrize(
    "name", ["tiny31_paddlevit.pdparams", "tiny31_official_train_ckpt.pth", ""]
)
def test_weights_of_another_program_are_pointed_to_pretrained(name, tmp_path):
    path = str(FIXTURES / name)
    if not name:
        path = save_at(tmp_path, 1, 5)
        rewrite(path, lambda *_: {})
    with pytest.raises(InputError, match="not a training checkpoint.*-pretrained"):
        load_checkpoint(path)


# ---- which one to go on from


def test_newest_is_by_epoch_and_step_not_by_text_or_time(tmp_path):
    old = save_at(tmp_path, 9, 99999998)
    new = save_at(tmp_path, 10000, 100000000)  # one digit more than the names have room for
    os.utime(old)
    assert checkpoints(str(tmp_path)) == [old, new]
    assert newest_whole_checkpoint(str(tmp_path)).file.path == new


@pytest.mark.parametrize("damaged", [1, 2, 3])
def test_damaged_checkpoints_are_passed_over_with_a_warning_each(tmp_path, caplog, damaged):
    paths = [save_at(tmp_path, 1, step) for step in (5, 6, 7)]
    for number, path in enumerate(paths[-damaged:]):
        content = Path(path).read_bytes()
        half = len(content) // 2
        cut = [content[:half], content[:-1] + bytes([content[-1] ^ 255]), b""][number]
        Path(path).write_bytes(cut)
    newest = newest_whole_checkpoint(str(tmp_path))
    assert (newest and newest.file.path) == (paths[2 - damaged] if damaged < 3 else None)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == damaged
    for path in paths[-damaged:]:
        assert any(path in warning for warning in warnings)


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert newest_whole_checkpoint(str(tmp_path)) is None
    assert newest_whole_checkpoint(str(tmp_path / "no such run")) is None
    (tmp_path / "checkpoints").mkdir()
    unfinished = "epoch_0001_step_00000005.safetensors.123.unfinished"
    (tmp_path / "checkpoints" / unfinished).write_bytes(b"half")
    assert newest_whole_checkpoint(str(tmp_path)) is None


# ---- links


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def links(request, monkeypatch):
    """Whether the file system has links."""
    if not request.param:

        def refuse(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "symlink", refuse)
    return request.param


def test_last_and_best_stand_for_checkpoints(tmp_path, links):
    first, second = save_at(tmp_path, 1, 5), save_at(tmp_path, 2, 10)
    for path in (first, second):
        point_to(str(tmp_path), "last", path)
        assert_same(load_checkpoint(str(tmp_path / "last")), load_checkpoint(path))
    assert names(tmp_path) == ["checkpoints", "last"]
    assert os.path.islink(tmp_path / "last") == links


def test_a_run_folder_that_moves_keeps_its_links(tmp_path):
    (tmp_path / "before").mkdir()
    path = save_at(tmp_path / "before", 1, 5)
    point_to(str(tmp_path / "before"), "last", path)
    os.rename(tmp_path / "before", tmp_path / "after")
    assert load_checkpoint(str(tmp_path / "after" / "last")).progress.step == 5


def test_what_a_killed_process_left_of_a_link_is_no_obstacle(tmp_path):
    path = save_at(tmp_path, 1, 5)
    os.symlink("nowhere", tmp_path / "last.unfinished")
    point_to(str(tmp_path), "last", path)
    assert load_checkpoint(str(tmp_path / "last")).progress.step == 5
    assert names(tmp_path) == ["checkpoints", "last"]


# ---- which ones stay


# Epochs and steps of the checkpoints of a run, how often and how many are kept, and steps left.
KEPT = {
    "every 3rd epoch and the newest": ([(e, 10 * e) for e in range(1, 8)], 3, 2, [30, 60, 70]),
    "of a 3rd epoch its end, not what follows": (
        [(2, 20), (2, 25), (3, 30), (3, 33), (3, 36), (4, 40), (4, 44)], 3, 1, [30, 44]
    ),
    "the beginning of the first epoch is no epoch": ([(0, 2), (0, 4), (0, 6)], 1, 1, [6]),
}  # fmt: skip


def steps_left(run_folder) -> list[int]:
    return [int(os.path.basename(path)[16:24]) for path in checkpoints(str(run_folder))]


@pytest.mark.parametrize("saved, every, newest, left", KEPT.values(), ids=KEPT)
def test_newest_and_every_kth_epoch_stay(tmp_path, saved, every, newest, left):
    for epoch, step in saved:
        save_at(tmp_path, epoch, step)
    remove_superseded(str(tmp_path), keep_every=every, keep_newest=newest)
    assert steps_left(tmp_path) == left


def test_best_stays(tmp_path, links):
    paths = [save_at(tmp_path, epoch, 10 * epoch) for epoch in range(1, 6)]
    point_to(str(tmp_path), "best", paths[1])
    remove_superseded(str(tmp_path), keep_every=100, keep_newest=1)
    assert load_checkpoint(str(tmp_path / "best")).progress.step == 20
    assert steps_left(tmp_path) == ([20, 50] if links else [50])


def test_unfinished_files_go_and_whole_ones_stay(tmp_path):
    path = save_at(tmp_path, 1, 5)
    unfinished = f"{path}.4711.unfinished"
    Path(unfinished).write_bytes(b"half a checkpoint")
    remove_superseded(str(tmp_path), keep_every=100, keep_newest=1)
    assert names(tmp_path / "checkpoints") == [os.path.basename(path)]


# ---- where a checkpoint belongs

SAVED = "checkpoints/epoch_0001_step_00000005.safetensors"


@pytest.mark.parametrize(
    "here, named",
    [
        *((".", name) for name in ("run", "run/last", f"run/{SAVED}", "link")),
        *(("run", name) for name in ("last", "./last", "checkpoints/../last", ".")),
    ],
)
def test_a_checkpoint_knows_its_run_folder(tmp_path, monkeypatch, here, named):
    run = tmp_path / "run"
    path = save_at(run, 1, 5)
    (run / "config.yaml").write_text("SEED: 2\n")
    point_to(str(run), "last", path)
    os.symlink(path, tmp_path / "link")
    monkeypatch.chdir(tmp_path / here)
    folder = run_folder_of(named)
    assert folder, repr(folder)  # '' is no value of SAVE
    assert os.path.realpath(folder) == os.path.realpath(run)
    assert config_of(named).SEED == 2  # in the file, 1


def test_a_checkpoint_alone_has_no_run_folder(tmp_path):
    path = str(tmp_path / "a.safetensors")
    save_checkpoint(path, example())
    assert run_folder_of(path) is None and config_of(path).SEED == 1
    write_safetensors(tmp_path / "b.safetensors", {}, {})
    with pytest.raises(InputError, match="carries no configuration .* -cfg"):
        config_of(tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        config_of(str(tmp_path / "nothing"))


# ---- going on


def test_later_checkpoints_are_set_aside_and_best_stays_known(tmp_path, caplog):
    paths = [save_at(tmp_path, epoch, 10 * epoch) for epoch in (1, 2, 3)]
    point_to(str(tmp_path), "best", paths[2])
    prepare_run_folder(str(tmp_path), replace(PROGRESS, epoch=1, step=10))
    assert checkpoints(str(tmp_path)) == paths[:1]
    assert names(tmp_path / "superseded") == [os.path.basename(path) for path in paths[1:]]
    assert caplog.text.count("is later than the checkpoint resumed; moved to") == 2
    assert load_checkpoint(str(tmp_path / "best")).progress.step == 30


def test_best_is_linked_again_after_a_crash_before_its_link(tmp_path):
    old, new = (save_at(tmp_path, epoch, 10 * epoch) for epoch in (1, 2))
    point_to(str(tmp_path), "best", old)
    prepare_run_folder(
        str(tmp_path),
        replace(PROGRESS, epoch=2, step=20, best_checkpoint=os.path.basename(new)),
    )
    assert load_checkpoint(str(tmp_path / "best")).progress.step == 20
