"""The command line: what is wrong is said once, and nothing is left behind."""

import io
import os
import sys

import numpy as np
import pytest
import yaml
from tiny import FIXTURES, ROOT, command, make_data

from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.config import get_config
from replknet_paddle.model import RepLKNet

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


@pytest.fixture
def refused(start, tmp_path):
    """Runs a command line that has to fail, and gives its message."""

    def run(*arguments, **options):
        done = start(*arguments, **options)
        assert done.status == 2, (done.status, done.out, done.err)
        assert "Traceback" not in done.err + done.out
        lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, done.err
        assert os.listdir(tmp_path / "here") == []  # no output/ either
        return done.err[done.err.index("error: ") :]

    return run


@pytest.fixture
def tiny(tiny_config_file, tiny_data, tmp_path):
    """Flags of a run that would work, and its run folder, which is not there yet."""
    return [f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", f"-output={tmp_path / 'run'}"]


# ---- bad input, one by one


def test_no_such_config(refused):
    message = refused("-cfg=configs/replknet_31c.yaml")
    assert "no config file configs/replknet_31c.yaml" in message
    assert "configs/replknet_31b.yaml" in message  # the nearest


def test_no_config_at_all(refused):
    assert "-cfg=configs/replknet_31b.yaml" in refused("-eval")


def test_misspelled_key_of_a_file(refused, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("TRAIN:\n  BASELR: 1e-3\nSAVE_FREC: 3\n")
    message = refused(f"-cfg={path}")
    assert f"{path}: unknown key TRAIN.BASELR; did you mean TRAIN.BASE_LR?" in message
    assert f"{path}: unknown key SAVE_FREC; did you mean SAVE_FREQ?" in message


def test_misspelled_key_of_opts(refused, tiny, tmp_path):
    message = refused(*tiny, "-opts", "TRAIN.NUM_EPOCH", "3")
    assert "unknown key TRAIN.NUM_EPOCH; did you mean TRAIN.NUM_EPOCHS?" in message
    assert not (tmp_path / "run").exists()


def test_misspelled_flag(start, tmp_path):
    done = start("-cfgs=x.yaml")
    assert done.status == 2 and "-cfgs=x.yaml" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("is_eval", [True, False])
@pytest.mark.parametrize("processes", [1, 2])
class TestData:
    """Faults of the data, found in one process and before several are started."""

    @pytest.fixture
    def complaint(self, refused, tiny_config_file, tmp_path, is_eval, processes):
        def run(folder):
            message = refused(
                f"-cfg={tiny_config_file}",
                f"-data_path={folder}",
                f"-output={tmp_path / 'run'}",
                f"-nproc={processes}",
                *(["-eval", "-pretrained=random"] if is_eval else []),
            )
            assert not (tmp_path / "run").exists()
            return message

        return run

    def test_no_such_path(self, complaint, tmp_path):
        folder = tmp_path / "imagenet"
        message = complaint(folder)
        assert f"no data folder {folder};" in message and "train_list.txt" in message

    def test_no_list(self, complaint, tmp_path):
        folder = tmp_path / "data"
        make_data(folder, train=16, val=8)
        (folder / "val_list.txt").unlink()
        message = complaint(folder)
        assert f"no list file {folder / 'val_list.txt'};" in message

    @pytest.mark.parametrize(
        "line, says",
        [
            ("val/a.jpg", "'val/a.jpg'"),
            ("val/a.jpg cat", "'cat'"),
            ("val/a.jpg 4", "label 4 is outside [0, 4)"),
            ("val/a.jpg -1", "label -1 is outside [0, 4)"),
        ],
    )
    def test_list_line(self, complaint, tmp_path, line, says):
        folder = tmp_path / "data"
        make_data(folder, train=16, val=8)
        with open(folder / "val_list.txt", "a") as file:
            file.write(f"{line}\n")
        message = complaint(folder)
        assert f"{folder / 'val_list.txt'}, line 9: " in message and says in message


@pytest.mark.parametrize("is_eval", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["missing", "broken"])
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


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("flag", ["-pretrained", "-resume"])
def test_missing_checkpoint(refused, tiny, tmp_path, flag, processes):
    message = refused(*tiny, f"{flag}={tmp_path / 'nothing.pdparams'}", f"-nproc={processes}")
    assert str(tmp_path / "nothing.pdparams") in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["-pretrained", "-resume"])
def test_missing_checkpoint_without_a_config(refused, tmp_path, flag):
    assert str(tmp_path / "nothing") in refused(f"{flag}={tmp_path / 'nothing'}")


def test_checkpoint_of_another_architecture_lists_names(refused, tiny, tmp_path):
    path = tmp_path / "other.safetensors"
    wider = RepLKNet(
        large_kernel_sizes=[7, 7, 5, 5], layers=[1, 1, 1, 1], channels=[5, 6, 8, 10], num_classes=4
    )
    state = {name: value.numpy() for name, value in wider.state_dict().items()}
    del state["head.bias"]
    state["stages.3.blocks.7.pw_conv_1.conv.weight"] = np.zeros((2, 2, 1, 1), "float32")
    write_safetensors(path, state, {})
    message = refused(*tiny, f"-pretrained={path}", "-eval")
    assert str(path) in message
    assert "channels [5, 6, 8, 10]" in message and "channels [4, 6, 8, 10]" in message
    assert "transitions.0.0.conv.weight: file (6, 5, 1, 1), network (6, 4, 1, 1)" in message
    assert "stages.3.blocks.7.pw_conv_1.conv.weight" in message  # unexpected
    assert "head.bias" in message  # missing
    assert len(message) < 5000
    assert not (tmp_path / "run").exists()


def test_weights_are_no_checkpoint_to_resume(refused, tiny, tmp_path):
    message = refused(*tiny, f"-resume={FIXTURES / 'tiny31_paddlevit.pdparams'}")
    assert "-pretrained" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many"])
@pytest.mark.parametrize("flag, key", [("batch_size", "BATCH_SIZE"), ("accum_iter", "ACCUM_ITER")])
def test_numbers_that_are_none(refused, tiny, tmp_path, flag, key, value):
    message = refused(*tiny, f"-{flag}={value}")
    assert f"-{flag}: " in message and f"{key} is '{value}'" in message
    assert "an integer >= 1" in message
    assert not (tmp_path / "run").exists()


def test_more_images_in_a_batch_than_there_are(refused, tiny, tmp_path):
    message = refused(*tiny, "-batch_size=31")
    assert "60 images" in message and "-batch_size" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("is_eval", [True, False])
def test_run_folder_that_cannot_be_written(refused, tiny, tmp_path, is_eval, processes):
    (tmp_path / "file").write_text("kept")
    folder = tmp_path / "file" / "run"
    flags = ["-eval", "-pretrained=random"] if is_eval else []
    message = refused(*tiny[:2], f"-output={folder}", f"-nproc={processes}", *flags)
    assert f"cannot write the run folder {folder}" in message and "-output" in message
    assert (tmp_path / "file").read_text() == "kept"


def test_run_folder_that_is_a_file(refused, tiny, tmp_path):
    (tmp_path / "run").write_text("kept")
    assert f"cannot write the run folder {tmp_path / 'run'}" in refused(*tiny)
    assert (tmp_path / "run").read_text() == "kept"


def test_resume_auto_without_a_run_folder(refused, tiny):
    message = refused(*tiny[:2], "-resume=auto")
    assert "MODEL.RESUME is auto" in message and "-output" in message
    refused("-resume=auto")


@pytest.mark.parametrize("is_eval", [True, False])
@pytest.mark.parametrize("processes", [1, 2])
def test_folder_of_another_run(refused, tiny, tmp_path, processes, is_eval):
    checkpoint = tmp_path / "run" / "checkpoints" / "epoch_0001_step_00000003.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"theirs")
    flags = ["-eval", "-pretrained=random"] if is_eval else []
    message = refused(*tiny, f"-nproc={processes}", *flags)
    assert f"{tmp_path / 'run'} holds the checkpoints of another run" in message
    assert os.listdir(tmp_path / "run") == ["checkpoints"]
    assert checkpoint.read_bytes() == b"theirs"


def test_resume_and_eval_contradict(refused, tiny, tmp_path):
    assert "MODEL.PRETRAINED" in refused(*tiny, "-eval", f"-resume={tmp_path}")


@pytest.mark.parametrize("processes", ["0", "-1", "two"])
def test_number_of_processes(start, tiny, tmp_path, processes):
    done = start(*tiny, "-nproc", processes)
    assert done.status == 2
    assert "nproc" in done.err and processes in done.err and "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("master", [None, "head", "head:", "head:0", "head:65536"])
def test_nodes_without_a_master(refused, tiny, monkeypatch, tmp_path, master):
    monkeypatch.setenv("NNODES", "2")
    if master is not None:
        monkeypatch.setenv("MASTER", master)
    assert "NNODES is 2; MASTER must be HOST:PORT" in refused(*tiny)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["NNODES", "NPROC_PER_NODE"])
@pytest.mark.parametrize("value", ["0", "-2", "two", ""])
def test_numbers_of_the_environment(refused, tiny, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert f"{name} is {value}; allowed: an integer >= 1" in refused(*tiny)


@pytest.mark.parametrize("master", ["10.0.0.1", "10.0.0.1:", ":8090", "10.0.0.1:port"])
def test_a_master_that_is_no_address(refused, tiny, monkeypatch, master):
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("MASTER", master)
    monkeypatch.setattr(
        "replknet_paddle.runtime.launch.launch", lambda *_, **__: 99
    )  # it would wait for ever
    message = refused(*tiny)
    assert "MASTER" in message and "HOST:PORT" in message and master in message


def test_wrong_values_are_reported_together(refused, tiny):
    message = refused(*tiny, "-batch_size=0", "-image_size=big", "-opts", "SEED", "x", "NO.KEY", 1)
    for part in ("DATA.BATCH_SIZE", "DATA.IMAGE_SIZE", "SEED", "NO.KEY"):
        assert part in message


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


def test_values_may_follow_after_a_space_and_abbreviations_are_refused(start):
    done = start("-cfg", f"{ROOT}/configs/replknet_31b.yaml", "-batch_size", "9", "-print_config")
    assert yaml.safe_load(done.out)["DATA"]["BATCH_SIZE"] == 9
    done = start("-cfg", f"{ROOT}/configs/replknet_31b.yaml", "-batch", "9", "-print_config")
    assert done.status == 2


@pytest.mark.parametrize("multi", [True, False])
def test_help_shows_an_example_and_every_flag(start, multi):
    done = start("-h", multi=multi)
    assert done.status == 0
    assert "example: python main_" in done.out
    for name in ("cfg", "data_path", "resume", "accum_iter", "amp", "last_epoch", "pretrained"):
        assert f"-{name}" in done.out and f"--{name}" in done.out


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
