"""The training command: its flags, the configuration it prints, and the mains."""

import io
import os
import sys

import pytest
import yaml
from tiny import ROOT, command, make_data

from replknet_paddle.config import get_config

main = command("train")

RECIPES = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


class Finished:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def start(capsys, monkeypatch, tmp_path):
    """Runs a command line in this process, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("NNODES", "MASTER", "NPROC_PER_NODE", "PADDLE_TRAINERS_NUM"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments, multi=True):
        capsys.readouterr()
        try:
            status = main([*map(str, arguments), *([] if multi else ["-nproc=1"])])
        except SystemExit as stop:  # argparse
            status = stop.code
        captured = capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    return run


@pytest.mark.parametrize(
    "how, workers, is_eval",
    [("missing", 0, True), ("missing", 2, False), ("broken", 0, False), ("broken", 2, True)],
)
def test_an_image_is_named_by_list_and_line(
    start, tiny_config_file, tmp_path, how, workers, is_eval
):
    folder = tmp_path / "data"
    make_data(folder, train=16, val=8)
    split = "val" if is_eval else "train"
    image = folder / split / "class 2" / "0006.jpg"
    if how == "missing":
        image.unlink()
    else:
        image.write_bytes(b"no image")
    done = start(
        f"-cfg={tiny_config_file}",
        f"-data_path={folder}",
        f"-output={tmp_path / 'run'}",
        "-opts",
        "DATA.NUM_WORKERS",
        workers,
        "EVAL",
        is_eval,
        "MODEL.PRETRAINED",
        "random" if is_eval else None,
        "DATA.MAX_BAD_IMAGES",
        0,
    )
    assert done.status == 2
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert f"{folder / f'{split}_list.txt'}, line 7: cannot read image" in line
    assert f"{split}/class 2/0006.jpg" in line
    assert "error" not in done.err.replace(line, "").lower(), done.err  # nothing from the workers
    assert "Traceback" not in done.err + done.out
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_training_goes_on_without_an_image_and_names_it(start, tiny_config_file, tmp_path):
    folder, run = tmp_path / "data", tmp_path / "run"
    make_data(folder, train=16, val=8)
    (folder / "train" / "class 2" / "0006.jpg").write_bytes(b"no image")
    done = start(f"-cfg={tiny_config_file}", f"-data_path={folder}", f"-output={run}")
    assert done.status == 0, done.err
    [line] = [line for line in done.out.splitlines() if "cannot read image" in line]
    assert f"{folder / 'train_list.txt'}, line 7: " in line and "1 of DATA.MAX_BAD_IMAGES" in line
    assert (run / "last").exists()


# ---- flags


@pytest.mark.parametrize("multi", [True, False])
@pytest.mark.parametrize("dashes", ["-", "--"])
def test_every_flag_has_both_forms(start, dashes, multi):
    values = {
        "dataset": "imagenet2012",
        "data_path": "/data/images of mine",
        "output": "out",
        "batch_size": 7,
        "batch_size_eval": 5,
        "image_size": 96,
        "accum_iter": 3,
        "pretrained": "weights.pdparams",
        "last_epoch": 2,
    }
    flags = [f"{dashes}{name}={value}" for name, value in values.items()]
    flags += [f"{dashes}{name}" for name in ("eval", "amp", "print_config")]
    cfg = f"{dashes}cfg={ROOT}/configs/replknet_31b.yaml"
    done = start(cfg, *flags, f"{dashes}opts", "SEED", "9", multi=multi)
    assert done.status == 0, done.err
    config = yaml.safe_load(done.out)
    assert config["DATA"]["DATA_PATH"] == "/data/images of mine"
    assert config["DATA"]["BATCH_SIZE"] == 7 and config["DATA"]["BATCH_SIZE_EVAL"] == 5
    assert config["DATA"]["IMAGE_SIZE"] == 96 and config["TRAIN"]["ACCUM_ITER"] == 3
    assert config["MODEL"]["PRETRAINED"] == "weights.pdparams"
    assert config["TRAIN"]["LAST_EPOCH"] == 2 and config["SAVE"] == "out"
    assert config["EVAL"] is True and config["AMP"] is True and config["SEED"] == 9


def test_resume_has_both_forms(start, tmp_path):
    for form in ("-resume=a", "--resume=a", "-resume a", "--resume a"):
        done = start(f"-cfg={ROOT}/configs/replknet_31b.yaml", *form.split(), "-print_config")
        assert yaml.safe_load(done.out)["MODEL"]["RESUME"] == "a"


def test_values_may_follow_after_a_space(start):
    done = start("-cfg", f"{ROOT}/configs/replknet_31b.yaml", "-batch_size", "9", "-print_config")
    assert yaml.safe_load(done.out)["DATA"]["BATCH_SIZE"] == 9


@pytest.mark.parametrize("multi", [True, False])
def test_help_shows_an_example_and_every_flag(start, multi):
    done = start("-h", multi=multi)
    assert done.status == 0
    assert "example: python main_" in done.out
    for name in ("cfg", "data_path", "resume", "accum_iter", "amp", "last_epoch", "pretrained"):
        assert f"  -{name}" in done.out


# ---- print_config


@pytest.mark.parametrize("name", RECIPES)
def test_printed_config_loads_as_the_same(start, tmp_path, name):
    done = start(f"-cfg={ROOT}/configs/{name}", "--print_config", multi=False)
    assert done.status == 0
    kind = "UPerNet" if name.startswith("upernet") else "RepLKNet"
    assert yaml.safe_load(io.StringIO(done.out))["MODEL"]["TYPE"] == kind
    path = tmp_path / "printed.yaml"
    path.write_text(done.out)
    assert get_config(str(path)) == get_config(str(ROOT / "configs" / name))
    assert os.listdir(tmp_path / "here") == []


# ---- the scripts as people start them


@pytest.mark.parametrize("script", ["main_single_gpu.py", "main_multi_gpu.py"])
def test_a_mistake_ends_the_real_program_with_one_line_and_status_2(run_main, script, tmp_path):
    done = run_main(
        "-cfg=./configs/replknet_31b.yaml",  # relative to the checkout, as in the README
        f"-data_path={tmp_path / 'imagenet'}",
        f"-output={tmp_path / 'run'}",
        script=script,
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert [line for line in errors if line.startswith("error: no data folder")]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_importing_the_mains_does_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "-h"])
    import main_multi_gpu
    import main_single_gpu

    assert main_multi_gpu.run_command is main_single_gpu.run_command
    assert capsys.readouterr() == ("", "")
