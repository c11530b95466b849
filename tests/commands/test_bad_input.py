"""Bad input of every command: one message, exit status 2, no traceback, and nothing is written.

A row is a command line, as it is typed after `replknet`, and parts of its message. {f} is a folder
with the files that `folder` makes, {x} that of the fixtures, and {p} a picture; variables of the
environment may come first, and WITHOUT, a package that is then not there.
"""

import os
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
from harness import free_ports, make_run
from PIL import Image
from tiny import FIXTURES, ROOT, TINY, TINY31, command, make_data

from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.deploy.export import FILE
from replknet_paddle.model import RepLKNet
from replknet_paddle.runtime.files import file_sha256

NANO = f"-cfg={ROOT}/configs/replknet_nano.yaml"
CFG = "train -cfg={f}/tiny.yaml -data_path={f}/data"
RUN = CFG + " -output={f}/run"
EVAL = " -eval -pretrained=random"
UPERNET = f"random -cfg={ROOT}/configs/upernet_nano_shapes.yaml"
EXPORT = "export {f}/made/best"
INT8 = EXPORT + " -format onnx -precision int8"
MERGE = "merge -cfg={f}/tiny31.yaml "
WEIGHTS = "{x}/tiny31_paddlevit.pdparams"
PREDICT = "predict {f}/made"
EVAL_EXPORT = "eval -cfg={f}/made/config.yaml -data_path={f}/data -pretrained={f}/exported"

CASES = [
    # configurations and flags
    ("train -cfg=configs/replknet_31c.yaml",
     "no config file configs/replknet_31c.yaml (tried ", "configs/replknet_31b.yaml"),
    # an unset variable of the shell
    *[(f"{line}=", f"{line.rpartition('-')[2]} is empty; give a value")
      for line in ("train -cfg", "eval -pretrained", RUN + " -output", RUN + " -pretrained",
                   "predict {f}/made {p} -cfg", "page {f}/made --port={port} -cfg",
                   "export {f}/made -output", "merge {f}/made -output",
                   "convert {f}/made -output {f}/new.safetensors -cfg", "benchmark inference -cfg",
                   "check-data {f}/data -output", "make-lists {f}/data -val",
                   "erf {f}/made {x}/images -output", "kernels {f}/made/best -output",
                   "segment train -cfg", "segment predict {f}/made {p} -output",
                   EVAL_EXPORT + " -backend")],
    *[(line, says) for line, says in (
        ("predict '' {p}", "MODEL is empty"), ("predict {f}/made ''", "IMAGE is empty"),
        ("page ''", "MODEL is empty"), ("model-info ''", "MODEL is empty"),
        ("make-digits ''", "DIR is empty"),
        ("plot {f}/made ''", "RUN is empty"), (PREDICT + " {p} --save-pictures=", "is empty"))],
    (RUN + " -opts SAVE ''", "SAVE is ''; allowed: text, or None"),
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
    *[(RUN + f" -{flag}", f"-{flag} without -eval; allowed: with -eval")
      for flag in ("backend paddle", "report {f}/new", "tta flip", "protocol imagenet-a")],
    (RUN + EVAL + " -report={f}/theirs", "folder {f}/theirs is not empty"),
    (RUN + " -freeze=stems", "TRAIN.FREEZE has 'stems'"),
    *[(RUN + " -best_by=average_precision -opts MODEL.NUM_CLASSES None" + line,
       "TRAIN.BEST_BY is average_precision, which ", says)  # counted in the lists
      for line, says in (
        ("", "defined for two classes; the network has 4 classes"),
        (" DATA.DATA_PATH {f}/one_class",
         "needs images of both classes in {f}/one_class/val_list.txt"),
    )],
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
    # temperatures and mirror images
    ("eval {f}/made -data_path={f}/data -opts MODEL.TEMPERATURE 0", "a number from 0.01 to 100"),
    (f"eval {UPERNET} -data_path={{f}}/data -tta=flip", "SEGMENTATION.EVAL_FLIP True"),
    (f"eval {UPERNET} -opts MODEL.TEMPERATURE 2", "allowed with MODEL.TYPE UPerNet"),
    (f"calibrate {UPERNET} -o new.safetensors", "calibrate of a segmentation"),
    # what would steer the terminal
    ("train -cfg={f}/steering.yaml", r"unknown key TRAIN.\x1b[2J", r"MODEL.TYPE is '\x1b[31mred"),
    (RUN + " -data_path={f}/steering", r"steering/val_list.txt, line 9: ", r"\x1b]0;owned\x07.jpg"),
    (PREDICT + " {f}/steering\x1b[2J\u202e.png", r"{f}/steering\x1b[2J\u202e.png"),
    (RUN + " -pretrained={f}/steering.safetensors", r"\x1b[2J.weight"),
    ("predict {f}/steering_record {p}", r"\x1b"),
    # data, and the run folder
    *[(line + f" -nproc={processes}" + what, *says)
      for processes in (1, 2)
      for what in ("", EVAL)
      for line, *says in (
        ("train -cfg={f}/tiny.yaml -output={f}/run -data_path={f}/none",
         "no data folder {f}/none;", "train_list.txt"),
        ("train -cfg={f}/tiny.yaml -output={f}/run -data_path={f}/theirs",
         "no list file {f}/theirs/"),
        (CFG + " -output={f}/file/run",
         "cannot write {f}/file/run: {f}/file is a file; name another place"),
        (CFG + " -output={f}/theirs", "{f}/theirs holds the checkpoints of another run"),
    )],
    (CFG + " -output={f}/file", "cannot write {f}/file"),
    *[(f"train -cfg={{f}}/tiny.yaml -output={{f}}/run -data_path='{{f}}/{name}'",
       f"{{f}}/{name}/val_list.txt, line 9: ", says)
      for name, says in (("no label", "'val/a.jpg'"), ("word", "'val/a.jpg cat' ends with 'cat'"),
                         ("large", "label 4 is outside [0, 4)"),
                         ("negative", "label -1 is outside [0, 4)"))],
    ("train -cfg={f}/tiny.yaml -output={f}/run -data_path={f}/utf16",
     "{f}/utf16/val_list.txt seems to be text in UTF-16; save it as UTF-8"),
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
    ("eval -pretrained=output/none/best", "no model output/none/best (tried "),
    (f"predict output/none/best {FIXTURES}/images", "no model output/none/best (tried "),
    *[(line, "did you mean weights/p4.pdparams?")
      for line in ("eval -pretrained=weights/p4", f"predict weights/p4 {FIXTURES}/images",
                   f"train -nproc=2 {NANO} -pretrained=weights/p4",
                   f"train -nproc=2 {NANO} -resume=weights/p4")],
    # exports
    *[(EXPORT + line, says) for line, says in (
        (" -format tflite -output {f}/new", "allowed: paddle, onnx"),
        (" -precision fp8 -output {f}/new", "allowed: fp32, fp16, bf16, int8"),
        (" -precision int8 -output {f}/new", "allowed: -format onnx"),
        (" -cfg {f}/other_run.yaml -output {f}/new", "does not fit"),
        (" -output {f}/full", "not an earlier export"),
        (" -output {f}/no/where", "no folder"),
        (" -class_names {f}/names.txt -output {f}/new", "has 3 lines"),
        (" -class_names {f}/latin.txt -output {f}/new", "UTF-8"),
        (" -class_names {f}/none.txt -output {f}/new", "none.txt"),
        (" -validation_images -1 {f}/new", "-validation_images -1"),
    )],
    (INT8 + " -data_path {f}/no_data -output {f}/new", "no_data"),
    (INT8 + " -calibration_images 0 -output {f}/new", "calibration_images 0"),
    (INT8 + " -validation_images 0 -output {f}/new", "-validation_images 0; al"),
    ("export {f}/nowhere -output {f}/new", "nowhere"),
    ("export {f}/empty_run -output {f}/new", "neither"),
    *[(EVAL_EXPORT + flags, says) for flags, says in (
        (" -backend=tensorrt", "allowed: auto, eager, paddle"),
        (" -backend=onnxruntime", "format paddle"),
        (" -opts MODEL.NUM_CLASSES 7", "MODEL.NUM_CLASSES is 4, in"),
        (" -opts MODEL.NAME big", "MODEL.NAME is tiny, in the"),
    )],
    # merged and converted files
    *[(MERGE + line, says) for line, says in (
        ("{f}/nowhere -output {f}/new.safetensors", "nowhere"),
        (WEIGHTS + " -cfg {f}/no.yaml -output {f}/new.safetensors", "no.yaml"),
        (WEIGHTS + " -cfg {f}/wrong.yaml -output {f}/new.safetensors", "MODEL.NAME"),
        (WEIGHTS + " -cfg {f}/other.yaml -output {f}/new.safetensors", "tiny31_paddlevit"),
        (WEIGHTS + " -cfg {f}/classes.yaml -output {f}/new.safetensors", "head"),
        ("{f}/garbage.pdparams -output {f}/new.safetensors", "garbage.pdparams"),
        ("{f}/empty.pdparams -output {f}/new.safetensors", "empty.pdparams"),
        ("{f}/cut.pdparams -output {f}/new.safetensors", "cut.pdparams"),
        ("{f}/full -output {f}/new.safetensors", "full"),
        ("{x}/tinyxl_paddlevit.pdparams -output {f}/new.safetensors", "tinyxl_paddlevit"),
        ("{x}/tinyxl_paddlevit.pdparams -output {f}/older.safetensors", "safetensors exists"),
        ("{x}/tinyxl_paddlevit.pdparams -overwrite -output {f}/older.safetensors", "fit"),
        (WEIGHTS + " -output {f}/nowhere/out.safetensors", "nowhere"),
        (WEIGHTS + " -output {f}/file/out.safetensors", "file"),
        (WEIGHTS + " -output {f}/folder.safetensors", "folder.safetensors"),
        (WEIGHTS + " -output {f}/out.pdparams", ".safetensors"),
    )],
    ("merge {f}/nowhere -output {f}/new.safetensors", "nowhere"),
    (f"merge {WEIGHTS} -output {{f}}/new.safetensors", "-cfg"),
    *[(f"convert {line} -cfg={{f}}/tiny31.yaml", says) for line, says in (
        ("{x}/tiny31_official.pth -output {f}/x.pth", "must end in .safetensors or .pdparams"),
        ("{x}/tiny31_official.pth -output {f}/x.pdparams -to official", "native names"),
        ("{x}/tinyxl_official.pth -output {f}/x.pdparams", "MODEL.DW_RATIO: 1.5"),
        ("{x}/tiny31_official_merged.pth -output {f}/x.pdparams", "_KERNEL_MERGED: True"),
        ("{f}/absent.pth -output {f}/x.pdparams", "no model {f}/absent.pth; allowed"),
        ("{x}/tiny31_official.pth -output {f}/absent/x.pdparams", "no folder"),
        ("{x}/tiny31_official.pth -output {f}/x.pdparams -opts MODEL.NAMES x", "NAMES"),
    )],
    ("convert {x}/tiny31_official.pth -output {f}/x.pdparams", "-cfg"),
    # predictions
    ("predict {f}/nowhere {p}", "no model {f}/nowhere; allowed: "),
    ("predict {f}/no_record {p}", "neither best nor last is there"),
    ("predict {f}/other_version {p}", "format_version 99"),
    ("predict {f}/no_json {p}", "not valid JSON"),
    ("predict {f}/no_model {p}", "model.pdiparams"),
    *[(line, says)
      for line_of in ("predict {f}/%s {p}", "page {f}/%s --port={port}")
      for line, says in (
        (line_of % "writes", "{f}/writes/model.json holds what no export has: 1.save_combine. "),
        (line_of % "many_classes", "shape (1, 4), which does not fit MODEL.NUM_CLASSES 2147483647"),
        (line_of % "few_classes", "shape (1, 4), which does not fit MODEL.NUM_CLASSES 2;"),
    )],
    ("predict {p} {p}", "{p}"),
    ("predict {f}/exported {p} -cfg={f}/tiny.yaml", "an export, which is as it was made"),
    ("predict {f}/exported {p} -opts SEED 1", "an export, which is as it was made"),
    ("predict {f}/exported nowhere.png -save_heat_maps=maps", "of {f}/exported on backend auto; "),
    *[(f"predict {{f}}/made {line}", says) for line, says in (
        ("nowhere.png -save_heat_maps=maps -backend=onnxruntime", "on backend onnxruntime; "),
        ("{p} -save_heat_maps=maps", "for 32 pixels, whose map has a single position; "),
        ("{p} -save_heat_maps=drawn", "-save_pictures and -save_heat_maps drawn; allowed: two"),
        ("{p} -save_heat_maps=data", "folder data is not empty"),
    )],
    ("predict {f}/tiny.yaml {p}", "no weights: MODEL.PRETRAINED is None; name a checkpoint, a run"),
    ("predict {f}/tiny.yaml {p} -cfg={f}/other.yaml", "-cfg {f}/other.yaml; allowed: one"),
    ("eval {f}/made -pretrained={f}/other -data_path={f}/data", "allowed: one of them"),
    ("predict replknet-31b-1k-225 {p}", "did you mean replknet-31b-1k-224?"),
    *[(PREDICT + line, says) for line, says in (
        (" {f}/nowhere.png", "no image, folder or pattern {f}/nowhere.png"),
        (" '{f}/*.gif'", "no file matches {f}/*.gif"),
        (" {f}/empty", "no image in the folder {f}/empty"),
        (" {f}/names.txt", "no image in the list {f}/names.txt; {f}/names.txt, line 1: expected a"),
        (" {f}/empty.txt", "no image in the list {f}/empty.txt. A list has"),
        (" {f}/large/val_list.txt",
         "/large/val/a.jpg has the label 4 in its list; allowed with {f}/made: labels below 4"),
        (" {f}/huge.png", "could be decompression bomb"),
        (" {f}/text.mp4", "OpenCV cannot open it as a film"),
        (" {p} -reject=0", "-reject is 0.0; allowed: a probability above 0"),
        (" {p} --topk=0", "-topk is 0; allowed: an integer >= 1"),
        (" {p} -batch_size=0", "-batch_size is 0; allowed"),
        (" {p} --every=-1", "-every is -1.0; allowed"),
        (" {p} --every=nan", "-every is nan; allowed"),
        (" {p} -backend=fastest", "fastest"),
        (" {p} -output={f}/r.txt", "must end in .jsonl or .csv"),
        (" {p} -output={f}/folder.csv", "is a folder"),
        (" {p} -output={f}/no/r.csv", "no folder"),
        (" {p} --save-pictures={f}/full", "is not empty"),
        (" {p} --save-pictures={f}/names.txt", "is a file"),
        (" {p} --save-grid={f}/there.png", "there.png exists"),
        (" {p} --save-grid={f}/new.bmp", "must end in .png or .jpg"),
        (" {p} -opts MODEL.NAMES x", "MODEL.NAMES"),
        (" {p} -cfg={f}/no.yaml", "no.yaml"),
    )],
    # the page
    *[(f"page model --port={port}", f"-port is {port}; allowed: an integer from 1 to 65535")
      for port in (0, -1, 65536)],
    ("page nowhere --port={port}", "no model nowhere (tried "),
    ("page {f}/exported --port={port} -opts SEED 1", "an export, which is as it was made"),
    # optional packages
    *[(f"WITHOUT={package} {line}", f"this needs {package}", f"requirements/{extra}.txt")
      for package, line, extra in (("cv2", PREDICT + " {f}/text.mp4", "video"),
                                   ("gradio", "page {f}/made --port={port}", "page"),
                                   ("elpv_dataset", "make-solar-cells {f}/cells", "solar"))],
    # datasets
    ("make-digits {f}/file/digits", "{f}/file"),
    ("make-solar-cells {f}/file/cells", "{f}/file"),
    ("make-shapes {f}/run -count 4", "-count is 4; allowed: an integer >= 5"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given files")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "misspelled.yaml").write_text("TRAIN:\n  BASELR: 1e-3\nSAVE_FREC: 3\n")
    for name in (
        "weights",
        "made",
        "empty",
        "full",
        "empty_run",
        "folder.csv",
        "folder.safetensors",
    ):
        (folder / name).mkdir()
    (folder / "latin.txt").write_bytes(b"\xe4\n")
    (folder / "garbage.pdparams").write_bytes(os.urandom(4096))
    source = FIXTURES / "tiny31_paddlevit.pdparams"
    (folder / "cut.pdparams").write_bytes(source.read_bytes()[:20_000])
    for name, text in {
        "file": "kept",
        "full/file": "",
        "weights/p4.pdparams": "",
        "empty.pdparams": "",
        "empty.txt": "",
        "older.safetensors": "precious",
        "there.png": "precious",
        "text.mp4": "precious",
        "names.txt": "only\nthree\nnames\n",
        "empty_run/config.yaml": TINY,
        "other_run.yaml": TINY.replace("10]", "12]"),
        "tiny31.yaml": TINY31,
        "other.yaml": TINY31.replace("24", "20"),
        "classes.yaml": TINY31.replace("NUM_CLASSES: 10", "NUM_CLASSES: 7"),
        "wrong.yaml": "MODLE: {NAME: x}",
        "steering.yaml": r'TRAIN: {"\e[2J": 1}' + "\n" + r'MODEL: {TYPE: "\e[31mred"}',
    }.items():
        (folder / name).write_text(text)
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    make_run(folder / "made")
    assert command("export")([str(folder / "made"), "-output", str(folder / "exported")]) == 0
    for name in ("no_record", "other_version", "no_json", "no_model", "steering_record"):
        shutil.copytree(folder / "exported", folder / name)
    for name, file, before, after in (
        ("writes", "model.json", '"1.relu"', '"1.save_combine"'),
        ("many_classes", "config.yaml", "NUM_CLASSES: 4", f"NUM_CLASSES: {2**31 - 1}"),
        ("few_classes", "config.yaml", "NUM_CLASSES: 4", "NUM_CLASSES: 2"),
    ):
        shutil.copytree(folder / "exported", folder / name)
        path, record = folder / name / file, folder / name / FILE
        digest = file_sha256(path)
        path.write_text(path.read_text().replace(before, after))
        record.write_text(record.read_text().replace(digest, file_sha256(path)))
    (folder / "no_record" / FILE).unlink()
    newer = (folder / "exported" / FILE).read_text().replace('version": 2', 'version": 99')
    (folder / "other_version" / FILE).write_text(newer)
    (folder / "no_json" / FILE).write_text("{")
    (folder / "steering_record" / FILE).write_text('{"format_version": "\\u001b[2J"}')
    (folder / "no_model" / "model.pdiparams").unlink()
    checkpoint = folder / "theirs" / "checkpoints" / "epoch_0001_step_00000003.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"theirs")
    make_data(folder / "data", train=60, val=8)
    make_data(folder / "one_class", train=60, val=1, classes=2)
    for name, line in (
        ("no label", "val/a.jpg"),
        ("word", "val/a.jpg cat"),
        ("large", "val/a.jpg 4"),
        ("negative", "val/a.jpg -1"),
        ("steering", "val/\x1b]0;owned\x07.jpg"),
    ):
        make_data(folder / name, train=16, val=8)
        with open(folder / name / "val_list.txt", "a") as file:
            file.write(f"{line}\n")
    make_data(folder / "utf16", train=16, val=8)
    (folder / "utf16" / "val_list.txt").write_text("val/a.jpg 0\n", "utf-16-le")
    wider = RepLKNet(
        large_kernel_sizes=[7, 7, 5, 5], layers=[1, 1, 1, 1], channels=[5, 6, 8, 10], num_classes=4
    )
    state = {name: value.numpy() for name, value in wider.state_dict().items()}
    del state["head.bias"]
    state["stages.3.blocks.7.pw_conv_1.conv.weight"] = np.zeros((2, 2, 1, 1), "float32")
    write_safetensors(folder / "wider.safetensors", state, {})
    state["\x1b[2J.weight"] = state.pop("head.weight")
    write_safetensors(folder / "steering.safetensors", state, {})
    return folder


def snapshot(folder) -> dict:
    """The files below a folder, by size and time, and the folders."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {p: p.is_dir() or (stat.st_size, stat.st_mtime_ns) for p, stat in found.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"\{f\}/|/\S*/", "", case[0]))
def test_bad_input_is_one_message_and_nothing_is_written(case, folder, monkeypatch, capfd):
    for word, package in {"make-digits": "sklearn", ".mp4": "cv2", "page ": "gradio"}.items():
        if word in case[0] and "WITHOUT" not in case[0]:
            pytest.importorskip(package, reason="an optional package", exc_type=ImportError)
    for name in ("NNODES", "MASTER", "NPROC_PER_NODE", "PADDLE_TRAINERS_NUM", "MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    started = lambda *_, **__: pytest.fail("a process was started")  # noqa: E731
    monkeypatch.setattr("replknet_paddle.runtime.launch.child_process", started)
    monkeypatch.chdir(folder)

    def filled(text):
        for name, value in {
            "{f}": folder,
            "{x}": FIXTURES,
            "{p}": FIXTURES / "images" / "landscape_499x375.jpg",
            "{port}": free_ports(1)[0],
        }.items():
            text = text.replace(name, str(value))
        return text

    line, *says = case
    words = [filled(word) for word in shlex.split(line)]
    while re.fullmatch("[A-Z_]+=.*", words[0]):
        name, value = words.pop(0).split("=", 1)
        if name == "WITHOUT":
            monkeypatch.setitem(sys.modules, value, None)
        else:
            monkeypatch.setenv(name, value)
    if words[0] == "predict":  # with every output that it could write
        outputs = {"-output": "r.csv", "--save-pictures": "drawn", "--save-grid": "grid.png"}
        words[3:3] = [f"{flag}={name}" for flag, name in outputs.items() if flag not in line]
    before = snapshot(folder)
    capfd.readouterr()
    try:
        status = command(words[0])(words[1:])
    except SystemExit as stop:  # argparse
        status = stop.code
    said = capfd.readouterr()
    assert status == 2, said
    assert "Traceback" not in said.err + said.out
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said.err + said.out)
    assert said.out == "" or words[0] in ("train", "eval")  # whose log it is
    assert len(re.findall(r"^(?:\S+ \S+: )?error: ", said.err, re.M)) == 1, said.err
    for part in says:
        assert filled(part) in said.err
    assert len(said.err) < 5000
    assert snapshot(folder) == before  # no output/ either
