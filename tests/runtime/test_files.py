"""Files: relative paths are looked up here, then in the project; writing is whole or not at all."""

import contextlib
import json
import math
import os
import secrets
import subprocess

import pytest
from tiny import ROOT, make_data

from replknet_paddle.config import get_config
from replknet_paddle.runtime import files
from replknet_paddle.runtime.files import (
    atomic_file,
    atomic_folder,
    command_line,
    find_path,
    json_text,
    locked,
    searched,
    write_text,
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder that the test stands in, and a project that is another one."""
    (tmp_path / "here").mkdir()
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(files, "PROJECT_FOLDER", tmp_path / "project")
    return tmp_path / "here"


def test_the_project_is_the_checkout():
    assert files.PROJECT_FOLDER == ROOT


def test_what_is_here_comes_first(here, tmp_path):
    project_file = tmp_path / "project" / "a.txt"
    assert find_path("a.txt") == "a.txt"
    project_file.write_text("")
    assert find_path("a.txt") == str(project_file)
    (here / "a.txt").write_text("")
    assert find_path("a.txt") == "a.txt"
    (here / "a.txt").unlink()
    (here / "a.txt").symlink_to("nowhere")  # a broken link is meant, not replaced
    assert find_path("a.txt") == "a.txt"
    assert find_path(str(tmp_path / "none")) == str(tmp_path / "none")


def test_messages_name_both_places(here, tmp_path, monkeypatch):
    project = tmp_path / "project"
    assert searched("x/y") == f"x/y (tried {here}/x/y and {project}/x/y)"
    assert searched("/x/y") == "/x/y"
    monkeypatch.chdir(project)
    assert searched("x/y") == f"x/y (tried {project}/x/y)"  # once


def test_data_and_weights_of_a_configuration_are_found(here, tmp_path):
    make_data(tmp_path / "project" / "data" / "own", train=8, val=4)
    (tmp_path / "project" / "weights").write_text("")
    config = get_config(DATA__DATA_PATH="data/own", MODEL__PRETRAINED="weights")
    assert config.DATA.DATA_PATH == str(tmp_path / "project" / "data" / "own")
    assert config.MODEL.PRETRAINED == str(tmp_path / "project" / "weights")
    config = get_config(DATA__DATA_PATH="data/other", MODEL__PRETRAINED="random")
    assert (config.DATA.DATA_PATH, config.MODEL.PRETRAINED) == ("data/other", "random")


def test_the_command_line_can_be_typed():
    """Whether or not the package's script is on the PATH."""
    line = command_line("plot", "--help")
    assert line.startswith("replknet ") or " -m replknet_paddle plot" in line
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage:" in done.stdout


def contents(folder) -> dict:
    return {path: path.is_dir() or path.read_text() for path in folder.rglob("*")}


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "write, moment",
    [(atomic_file, moment) for moment in ("never", "block", "fsync", "replace")]
    + [(atomic_folder, moment) for moment in ("never", "block", "rename")],
)
def test_a_file_and_a_folder_are_written_whole_or_not_at_all(
    tmp_path, monkeypatch, write, moment, error, is_there
):
    path = tmp_path / "made"
    error = error(28, "No space left on device")

    def fail(*_):
        raise error

    def fill(made, name):
        made.write(name) if write is atomic_file else (made / name).write_text("")

    if is_there:
        with write(path) as made:
            fill(made, "old")
    before = contents(tmp_path)
    if moment in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, moment, fail)
        monkeypatch.setattr(files, "_exchange", fail)
    with contextlib.nullcontext() if moment == "never" else pytest.raises(type(error)):  # noqa: SIM117
        with write(path) as made:
            fill(made, "new")
            if moment == "block":
                fail()
    if moment == "never":
        new = {path: True, path / "new": ""}
        assert contents(tmp_path) == ({path: "new"} if write is atomic_file else new)
    else:
        assert contents(tmp_path) == before
        assert isinstance(error, KeyboardInterrupt) or error.filename == str(path)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_at_one_moment_where_the_file_system_can(
    tmp_path, monkeypatch, can_exchange
):
    path, moves, rename = tmp_path / "made", [], os.rename
    with atomic_folder(path) as made:
        (made / "old").touch()
    monkeypatch.setattr(os, "rename", lambda *paths: moves.append(paths) or rename(*paths))
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: os.stat(tmp_path / "nothing"))
    with atomic_folder(path) as made:
        (made / "new").touch()
    assert contents(tmp_path) == {path: True, path / "new": ""}
    assert len(moves) == (0 if can_exchange else 2)  # no call takes the old folder's name away


def test_a_name_that_can_be_foreseen_is_not_used(tmp_path):
    with atomic_folder(tmp_path / "made") as first, atomic_folder(tmp_path / "made") as second:
        assert first != second and str(os.getpid()) != first.name.split(".")[1]


def test_a_temporary_name_cannot_be_foreseen_and_no_link_is_followed(tmp_path, monkeypatch):
    path, victim = tmp_path / "made", tmp_path / "victim"
    victim.write_text("theirs")
    with atomic_file(path) as first, atomic_file(path) as second:
        assert first.name != second.name
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    (tmp_path / "made.guessed.unfinished").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_text(path, "ours")
    assert victim.read_text() == "theirs" and path.read_text() == ""


def test_a_lock_that_is_a_link_empties_nothing(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    (tmp_path / "lock").symlink_to(victim)
    with locked(tmp_path / "lock"):
        assert victim.read_text() == "theirs"


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_file_has_the_permissions_that_the_user_gives_to_new_ones(tmp_path, umask, mode):
    previous = os.umask(umask)
    try:
        write_text(tmp_path / "made", "text")
    finally:
        os.umask(previous)
    assert (tmp_path / "made").stat().st_mode & 0o777 == mode


def test_json_has_no_word_for_a_number_that_is_not_finite():
    value = {"loss": math.nan, "all": [1.5, -math.inf, [math.inf]], "n": 3, "text": "NaN"}
    expected = {"loss": None, "all": [1.5, None, [None]], "n": 3, "text": "NaN"}
    assert json.loads(json_text(value)) == expected


def test_json_has_letters_as_they_are_and_is_utf_8_without_other_ends_of_lines():
    assert json_text({"Straße": ["猫", "🐟"]}) == '{"Straße": ["猫", "🐟"]}'
    value = "".join(map(chr, range(0x3000))) + "\udcfc\ud83d"
    text = json_text(value)
    assert json.loads(text) == value and len(text.encode("utf-8").decode().splitlines()) == 1
