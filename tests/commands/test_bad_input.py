"""Bad input of every command: one message, exit status 2, no traceback, and nothing is written.

A row is a command line, as it is typed after `replknet`, and parts of its message. {f} is a folder
with the files that `folder` makes; variables of the environment may come first.
"""

import os
import re
import shlex

import numpy as np
import pytest
from tiny import FIXTURES, ROOT, TINY, command, make_data

from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.model import RepLKNet

NANO = f"-cfg={ROOT}/configs/replknet_nano.yaml"
CFG = "train -cfg={f}/tiny.yaml -data_path={f}/data"
RUN = CFG + " -output={f}/run"
EVAL = " -eval -pretrained=random"

CASES = [
    # configurations and flags
    ("train -cfg=configs/replknet_31c.yaml",
     "no config file configs/replknet_31c.yaml (tried ", "configs/replknet_31b.yaml"),
    ("train -eval", "no configuration; give one by -cfg, e.g. -cfg=configs/replknet_31b.yaml"),
    ("train -cfg={f}/misspelled.yaml",
     "{f}/misspelled.yaml: unknown key TRAIN.BASELR; did you mean TRAIN.BASE_LR?",
     "{f}/misspelled.yaml: unknown key SAVE_FREC; did you mean SAVE_FREQ?"),
    (RUN + " -opts TRAIN.NUM_EPOCH 3",
     "unknown key TRAIN.NUM_EPOCH; did you mean TRAIN.NUM_EPOCHS?"),
    (RUN + " -batch_size=0 -image_size=big -opts SEED x NO.KEY 1",
     "DATA.BATCH_SIZE", "DATA.IMAGE_SIZE", "SEED", "NO.KEY"),
    ("train -cfgs=x.yaml", "-cfgs=x.yaml"),
    (f"train {NANO} -batch 9 -print_config", "-batch"),
    *[(RUN + f" -{flag}={value}", f"-{flag}: ", f"{key} is '{value}'", "an integer >= 1")
      for flag, key in (("batch_size", "BATCH_SIZE"), ("accum_iter", "ACCUM_ITER"))
      for value in ("0", "-3", "1.5", "many")],
    (RUN + " -batch_size=31", "60 images", "-batch_size"),
    (RUN + " -eval -resume={f}/run", "MODEL.PRETRAINED"),
    (RUN + " -backend=paddle", "-backend paddle without -eval; allowed: with -eval"),
    (RUN + " -report={f}/new", "-report {f}/new without -eval; allowed: with -eval"),
    (RUN + EVAL + " -report={f}/theirs", "folder {f}/theirs is not empty"),
    # processes
    *[(RUN + f" -nproc {value}", "-nproc", value) for value in ("0", "-1", "two")],
    *[(f"NNODES=2 MASTER={master} {RUN}", f"NNODES is 2; MASTER must be HOST:PORT of one of these "
       f"machines, got {master}")
      for master in ("head", "head:", "head:0", "head:65536", ":8090", "10.0.0.1:port")],
    ("NNODES=2 " + RUN, "NNODES is 2; MASTER must be HOST:PORT of one of these machines, got None"),
    ("NNODES=2 MASTER=no.such.host.invalid:80 " + RUN,
     "MASTER is no.such.host.invalid:80, and no.such.host.invalid does not resolve"),
    ("NNODES=2 MASTER=a:80 " + CFG, "NNODES is 2 and there is no -output"),
    *[(f"{name}={value} {RUN}", f"{name} is {value}; allowed: an integer >= 1")
      for name in ("NNODES", "NPROC_PER_NODE") for value in ("0", "-2", "two", "")],
    ("MAX_RESTARTS=many " + RUN, "MAX_RESTARTS is many; allowed: an integer >= 0"),
    # data, and the run folder
    *[(line + f" -nproc={processes}" + what, *says)
      for processes in (1, 2)
      for what in ("", EVAL)
      for line, *says in (
        ("train -cfg={f}/tiny.yaml -output={f}/run -data_path={f}/none",
         "no data folder {f}/none;", "train_list.txt"),
        ("train -cfg={f}/tiny.yaml -output={f}/run -data_path={f}/theirs",
         "no list file {f}/theirs/"),
        (CFG + " -output={f}/file/run", "cannot write the run folder {f}/file/run", "-output"),
        (CFG + " -output={f}/theirs", "{f}/theirs holds the checkpoints of another run"),
    )],
    (CFG + " -output={f}/file", "cannot write the run folder {f}/file"),
    *[(f"train -cfg={{f}}/tiny.yaml -output={{f}}/run -data_path='{{f}}/{name}'",
       f"{{f}}/{name}/val_list.txt, line 9: ", says)
      for name, says in (("no label", "'val/a.jpg'"), ("word", "'val/a.jpg cat' ends with 'cat'"),
                         ("large", "label 4 is outside [0, 4)"),
                         ("negative", "label -1 is outside [0, 4)"))],
    (f"train {NANO} -data_path=data/none", "no data folder data/none (tried "),
    # weights
    *[(RUN + f" -{flag}={{f}}/nothing.pdparams -nproc={processes}", "{f}/nothing.pdparams")
      for flag in ("pretrained", "resume") for processes in (1, 2)],
    *[(f"train -{flag}={{f}}/nothing", "{f}/nothing") for flag in ("pretrained", "resume")],
    (CFG + " -resume=auto", "MODEL.RESUME is auto", "-output"),
    ("train -resume=auto", ""),
    (RUN + f" -resume={FIXTURES}/tiny31_paddlevit.pdparams", "-pretrained"),
    (RUN + " -eval -pretrained={f}/wider.safetensors",
     "{f}/wider.safetensors", "channels [5, 6, 8, 10]", "channels [4, 6, 8, 10]",
     "transitions.0.0.conv.weight: file (6, 5, 1, 1), network (6, 4, 1, 1)",
     "stages.3.blocks.7.pw_conv_1.conv.weight", "head.bias"),
    ("eval -pretrained=output/none/best", "no checkpoint output/none/best (tried "),
    (f"predict output/none/best {FIXTURES}/images", "no model output/none/best (tried "),
    *[(line, "did you mean weights/p4.pdparams?")
      for line in ("eval -pretrained=weights/p4", f"predict weights/p4 {FIXTURES}/images",
                   f"train -nproc=2 {NANO} -pretrained=weights/p4",
                   f"train -nproc=2 {NANO} -resume=weights/p4")],
    # datasets
    ("make-digits {f}/file/digits", "{f}/file"),
    ("make-shapes {f}/run -count 4", "-count is 4; allowed: an integer >= 5"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given files")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "misspelled.yaml").write_text("TRAIN:\n  BASELR: 1e-3\nSAVE_FREC: 3\n")
    (folder / "file").write_text("kept")
    (folder / "weights").mkdir()
    (folder / "weights" / "p4.pdparams").touch()
    checkpoint = folder / "theirs" / "checkpoints" / "epoch_0001_step_00000003.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"theirs")
    make_data(folder / "data", train=60, val=8)
    for name, line in (
        ("no label", "val/a.jpg"),
        ("word", "val/a.jpg cat"),
        ("large", "val/a.jpg 4"),
        ("negative", "val/a.jpg -1"),
    ):
        make_data(folder / name, train=16, val=8)
        with open(folder / name / "val_list.txt", "a") as file:
            file.write(f"{line}\n")
    wider = RepLKNet(
        large_kernel_sizes=[7, 7, 5, 5], layers=[1, 1, 1, 1], channels=[5, 6, 8, 10], num_classes=4
    )
    state = {name: value.numpy() for name, value in wider.state_dict().items()}
    del state["head.bias"]
    state["stages.3.blocks.7.pw_conv_1.conv.weight"] = np.zeros((2, 2, 1, 1), "float32")
    write_safetensors(folder / "wider.safetensors", state, {})
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"\{f\}/|/\S*/", "", case[0]))
def test_bad_input_is_one_message_and_nothing_is_written(case, folder, monkeypatch, capsys):
    pytest.importorskip("sklearn" if case[0].startswith("make-digits") else "paddle")
    for name in ("NNODES", "MASTER", "NPROC_PER_NODE", "PADDLE_TRAINERS_NUM", "MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    started = lambda *_, **__: pytest.fail("a process was started")  # noqa: E731
    monkeypatch.setattr("replknet_paddle.runtime.launch.child_process", started)
    monkeypatch.chdir(folder)
    line, *says = case
    words = [word.replace("{f}", str(folder)) for word in shlex.split(line)]
    while re.fullmatch("[A-Z_]+=.*", words[0]):
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    try:
        status = command(words[0])(words[1:])
    except SystemExit as stop:  # argparse
        status = stop.code
    said = capsys.readouterr()
    assert status == 2, said
    assert "Traceback" not in said.err + said.out
    assert len(re.findall(r"^(?:\S+ \S+: )?error: ", said.err, re.M)) == 1, said.err
    for part in says:
        assert part.replace("{f}", str(folder)) in said.err
    assert len(said.err) < 5000
    assert sorted(folder.rglob("*")) == before  # no output/ either
    assert (folder / "file").read_text() == "kept"
    assert os.listdir(folder / "theirs") == ["checkpoints"]
