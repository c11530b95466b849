"""Checkpoint files: whole or not there, and which one a run goes on from."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from saved import assert_same, example, names, save_at
from tiny import ROOT

from replknet_paddle.checkpoints import checkpoint_file
from replknet_paddle.checkpoints.run_folder import (
    Checkpoint,
    Progress,
    checkpoints,
    load_checkpoint,
    newest_whole_checkpoint,
    save_checkpoint,
)
from replknet_paddle.runtime.errors import InputError

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
    save_checkpoint(path, Checkpoint("", Progress(), {"w": np.ones(2, "float32")}))
    got = load_checkpoint(path)
    assert got.model_ema == {} and got.optimizer == {} and got.scaler == {}
    assert got.progress == Progress()


def test_other_programs_can_read_it(tmp_path):
    numpy_reader = pytest.importorskip("safetensors.numpy", reason="another reader of the format")
    path = str(tmp_path / "a.safetensors")
    save_checkpoint(path, example())
    tensors = numpy_reader.load_file(path)
    assert {name.split(".")[0] for name in tensors} == {"model", "model_ema", "optimizer"}
    np.testing.assert_array_equal(tensors["model.turned"], example().model["turned"])


# ---- all or nothing


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, moment):
    path = save_at(tmp_path, 1, 5)
    before = Path(path).read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    if moment == "write":
        big = example(size=3)
        monkeypatch.setattr("builtins.open", refusing_writes(open))
    else:
        big = example(seed=9)
        monkeypatch.setattr(os, moment, fail)
    with pytest.raises(OSError, match="cannot write .*No space left on device") as caught:
        save_checkpoint(path, big)
    monkeypatch.undo()
    assert path in str(caught.value)
    assert "MiB are needed" in str(caught.value) and "MiB free" in str(caught.value)
    assert Path(path).read_bytes() == before
    assert names(os.path.dirname(path)) == [os.path.basename(path)]


def refusing_writes(real):
    class Full:
        def __init__(self, *arguments, **options):
            self.file = real(*arguments, **options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(bytes(data)[:10])
            self.file.flush()
            raise OSError(28, "No space left on device")

    return lambda name, mode="r", **options: (
        Full(name, mode, **options) if "w" in mode else real(name, mode, **options)
    )


def test_an_interrupt_in_mid_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_at(tmp_path, 1, 5)
    before = Path(path).read_bytes()

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, example(seed=9))
    assert Path(path).read_bytes() == before
    assert names(os.path.dirname(path)) == [os.path.basename(path)]


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


def test_a_checkpoint_folder_that_cannot_be_written_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        save_checkpoint(str(tmp_path / "file" / "checkpoints" / "a.safetensors"), example())


# ---- files that cannot be resumed


def header_length(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def test_nothing_there():
    with pytest.raises(FileNotFoundError, match="no checkpoint /no/such/file"):
        load_checkpoint("/no/such/file")


@pytest.mark.parametrize("where", [0.0, 0.25, 0.5, 0.999])
def test_a_flipped_bit_in_a_tensor_is_found(tmp_path, where):
    path = save_at(tmp_path, 1, 5)
    content = bytearray(Path(path).read_bytes())
    start = header_length(content)
    content[start + int(where * (len(content) - start))] ^= 1
    Path(path).write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.1, 0.5, 0.9, -100, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = save_at(tmp_path, 1, 5)
    content = Path(path).read_bytes()
    keep = int(keep * len(content)) if isinstance(keep, float) else keep
    Path(path).write_bytes(content[:keep])
    with pytest.raises(InputError, match="a.safetensors|epoch_0001_step_00000005.safetensors"):
        load_checkpoint(path)


def test_a_file_of_zeros_is_refused(tmp_path):
    """What a power cut can leave behind where a file system writes data after names."""
    path = save_at(tmp_path, 1, 5)
    Path(path).write_bytes(bytes(os.path.getsize(path)))
    with pytest.raises(InputError):
        load_checkpoint(path)


def test_no_flipped_byte_of_the_header_gives_another_checkpoint_or_a_traceback(tmp_path):
    path = save_at(tmp_path, 1, 5)
    content = Path(path).read_bytes()
    wanted = load_checkpoint(path)
    wrong = []
    for position in range(header_length(content)):
        damaged = bytearray(content)
        damaged[position] ^= 2
        Path(path).write_bytes(damaged)
        try:
            got = load_checkpoint(path)
        except InputError:
            continue
        except Exception as error:
            wrong.append((position, content[position - 20 : position + 20], repr(error)))
            continue
        try:
            assert_same(got, wanted)
        except AssertionError:
            wrong.append((position, content[position - 20 : position + 20], "another checkpoint"))
    assert not wrong, f"{len(wrong)} of {header_length(content)} positions, e.g. {wrong[:5]}"


def rewrite_metadata(path, change) -> None:
    content = Path(path).read_bytes()
    start = header_length(content)
    header = json.loads(content[8:start])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def test_a_newer_schema_is_named(tmp_path):
    path = save_at(tmp_path, 1, 5)

    def newer(header):
        ((key, text),) = header["__metadata__"].items()
        header["__metadata__"][key] = json.dumps({**json.loads(text), "schema_version": 2})

    rewrite_metadata(path, newer)
    with pytest.raises(InputError, match="schema version 2.*reads version 1"):
        load_checkpoint(path)


def test_a_newer_schema_of_another_layout_is_named(tmp_path):
    path = save_at(tmp_path, 1, 5)

    def newer(header):
        (key,) = header["__metadata__"]
        header["__metadata__"][key] = json.dumps({"schema_version": 7, "something": "else"})

    rewrite_metadata(path, newer)
    with pytest.raises(InputError, match="schema version 7"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["tiny31_paddlevit.pdparams", "tiny31_official_train_ckpt.pth"])
def test_weights_of_another_program_are_pointed_to_pretrained(name):
    with pytest.raises(InputError, match="not a training checkpoint.*-pretrained"):
        load_checkpoint(str(ROOT / "tests" / "fixtures" / name))


def test_safetensors_of_another_program_are_pointed_to_pretrained(tmp_path):
    path = save_at(tmp_path, 1, 5)
    rewrite_metadata(path, lambda header: header.pop("__metadata__"))
    with pytest.raises(InputError, match="not a training checkpoint.*-pretrained"):
        load_checkpoint(path)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises((InputError, OSError)):
        load_checkpoint(str(tmp_path))


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
    with caplog.at_level(logging.WARNING):
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


def test_schema_version_is_the_one_these_tests_know():
    assert checkpoint_file.SCHEMA_VERSION == 1
