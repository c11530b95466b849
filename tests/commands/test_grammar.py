"""One grammar for all commands: MODEL, flags, suggestions, destinations, and help that is true."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from harness import make_run
from PIL import Image
from tiny import FIXTURES, ROOT, make_data

from replknet_paddle.commands import COMMANDS, command_function, help_of, main
from replknet_paddle.commands.flags import FLAGS_OF_0_2, CommandParser
from replknet_paddle.zoo import find_record

PICTURE = str(FIXTURES / "images" / "landscape_499x375.jpg")
NAME = "replknet-31b-1k-224"


def parser_of(name: str) -> CommandParser:
    parser = CommandParser(name, prog=f"replknet {name}")
    command_function(name, "add_{}_flags")(parser)
    return parser


def flags_of(name: str) -> dict:
    """{name of the flag: its action} of a command."""
    actions = parser_of(name)._actions
    return {a.option_strings[-1].lstrip("-"): a for a in actions if a.option_strings}


# ---- flags


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_has_one_name_in_four_spellings(command):
    places = [a for a in parser_of(command)._actions if not a.option_strings]
    arguments = ["x"] * sum(a.nargs != "*" for a in places)
    for name, action in flags_of(command).items():
        if name == "help":
            continue
        required = [f"-{n}=r" for n, a in flags_of(command).items() if a.required and n != name]
        others = [choice for choice in action.choices or ["7"] if choice != action.default]
        value = others[:1] if action.nargs != 0 else []
        parsed = []
        for dashes in ("-", "--"):
            for spelled in {name, name.replace("_", "-")}:
                for words in ([dashes + spelled, *value], ["=".join([dashes + spelled, *value])]):
                    # Before the arguments, where they would not be taken for its values; or after.
                    lines = [[*required, *arguments, *words]]
                    lines += [[*words, *required, *arguments]] * (action.nargs != "+")
                    parsed += [parser_of(command).parse(line)[0] for line in lines]
        assert all(found == parsed[0] for found in parsed), name
        assert getattr(parsed[0], action.dest) not in (None, False, action.default), name
        assert len(parsed) >= 4


@pytest.mark.parametrize("command", [name for name in COMMANDS if len(flags_of(name)) > 1])
def test_a_mistyped_flag_is_told_the_right_one(command, capsys):
    for name in flags_of(command):
        if len(name) < 4:
            continue
        for wrong in (name[:-1], name[:2] + name[1:], name[0] + name[2] + name[1] + name[3:]):
            if wrong in flags_of(command) or wrong in FLAGS_OF_0_2.get(command, {}):
                continue
            with pytest.raises(SystemExit, match="2"):
                parser_of(command).parse([f"--{wrong}=1"])
            said = capsys.readouterr().err
            [line] = said.splitlines()
            assert f"unknown flag --{wrong}=1; did you mean -" in line
            if len(name) > 6 and wrong == name[:-1]:
                assert f"did you mean -{name}?" in line


@pytest.mark.parametrize(
    "line, says",
    [
        ("predct x", "unknown command predct; did you mean predict?"),
        ("segment predct x", "unknown command segment predct; did you mean segment predict?"),
        ("benchmark", "benchmark is a group of commands: benchmark conv, benchmark network"),
        ("segment", "segment is a group of commands: segment train, segment eval"),
        ("train run", "argument run; allowed: flags alone"),
        ("predict run", "the following arguments are required: IMAGE"),
        ("", "no command"),
        ("zzz", "unknown command zzz; `replknet -h` lists"),
        ("-verbose", "no command"),
    ],
)
def test_a_mistyped_command_is_told_the_right_one(line, says, capsys):
    try:
        status = main(shlex.split(line))
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    [said] = capsys.readouterr().err.splitlines()
    assert says in said


@pytest.mark.parametrize("line", ["-h", "predict -h", "benchmark -h", "--version"])
def test_a_reader_that_has_seen_enough_is_no_error(line):
    command = [sys.executable, "-m", "replknet_paddle", *line.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (0, 141)


def test_values_of_opts_follow_in_any_form(tmp_path):
    config = ["-cfg", str(ROOT / "configs" / "replknet_nano.yaml")]
    for words in (["-opts", "TRAIN.BASE_LR", "1e-3"], ["-opts=TRAIN.BASE_LR", "1e-3"]):
        args, _ = parser_of("train").parse([*words, *config])
        assert args.opts == ["TRAIN.BASE_LR", "1e-3"]
    args, _ = parser_of("train").parse(["-opts", "TRAIN.BASE_LR", "-1e-3", *config])
    assert args.opts == ["TRAIN.BASE_LR", "-1e-3"]


def test_the_version_names_everything_that_a_report_of_a_fault_needs(capsys):
    import paddle

    import replknet_paddle

    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"replknet_paddle {replknet_paddle.__version__}, ")
    assert f"Paddle {paddle.__version__}, Python 3." in said and "PU" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["segment", "-h"], ["benchmark", "-h"]])
def test_the_list_of_commands_fits_the_screen(arguments, capsys):
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines[2:])
    names = [name for name in COMMANDS if len(arguments) == 1 or name.split()[0] == arguments[0]]
    assert [line[2:].split("  ")[0] for line in lines if line.startswith("  ")] == names


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_a_sentence_and_lists_only_flags_that_are_used(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "-h"])
    said = capsys.readouterr().out
    usage, sentence = said.split("\n\n")[:2]
    assert usage.startswith(f"usage: replknet {command}") and len(usage.splitlines()) == 1
    assert re.fullmatch(r"[A-Z][^.]+\.", sentence.splitlines()[0])
    assert max(map(len, said.splitlines())) <= 100
    if command.endswith("eval"):
        for name in ("resume", "last_epoch", "accum_iter", "epochs", "lr"):
            assert f"-{name}" not in said


# ---- MODEL


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run folder, an export of it, a YAML file that names its weights, and data."""
    folder = tmp_path_factory.mktemp("original")
    (folder / "run").mkdir()
    make_run(folder / "run")
    make_data(folder / "data", train=16, val=8)
    (folder / "run" / "metrics.jsonl").write_text('{"epoch": 1, "train_loss": 1.0}\n')
    config = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    config["MODEL"]["PRETRAINED"] = str(folder / "run" / "best")
    (folder / "own.yaml").write_text(yaml.safe_dump(config))
    config["MODEL"]["PRETRAINED"] = None
    (folder / "fresh.yaml").write_text(yaml.safe_dump(config))
    assert main(["export", str(folder / "run"), "-output", str(folder / "exported")]) == 0
    return folder


@pytest.fixture
def folder(original, tmp_path, monkeypatch):
    """A copy of it, which this process is in, where NAME is published with these weights."""
    shutil.copytree(original, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    record = dataclasses.replace(find_record(NAME), config=str(original / "run" / "config.yaml"))
    monkeypatch.setattr("replknet_paddle.zoo.MODELS", (record,))
    monkeypatch.setattr("replknet_paddle.zoo.download.fetch", lambda _: original / "run" / "best")
    return tmp_path / "copy"


FORMS = (NAME, "own.yaml", "run/best", "run", "exported")
INFERENCE = "-backends eager -precisions fp32 -batch_sizes 1 -rounds 1"
# What follows MODEL.
USES = {
    "eval": "-data_path=data -nproc=1",
    "predict": f"{PICTURE} -backend=paddle",
    "embed": f"{PICTURE} -backend=paddle -output=new.npy",
    "page": "-port=7860",
    "export": "-output=new",
    "merge": "-output=new.safetensors",
    "convert": "-output=new.safetensors",
    "calibrate": "-data_path=data -backend=paddle -output=new.safetensors",
    "erf": "data/val -num_images=1 -image_size=32 -output=new.npy",
    "kernels": "-output=new.png",
    "model-info": "",
    "benchmark inference": INFERENCE,
    "benchmark network": "-rounds 1 -step_batch 1",
    "benchmark train_loop": "-steps 1 -rounds 1",
}
TAKES_WEIGHTS = ("export", "merge", "convert", "calibrate", "erf", "kernels", "benchmark inference")


def test_each_command_with_a_model_is_here():
    def has_model(name):
        return any(a.dest == "model" for a in parser_of(name)._actions)

    others = {"segment eval", "segment predict"}  # tests/segmentation/test_segment_command.py
    assert set(USES) | others == set(filter(has_model, COMMANDS))


@pytest.mark.parametrize("command", USES)
def test_a_model_has_five_forms(command, folder, monkeypatch, capfd):
    if command == "page":
        pytest.importorskip("gradio")
        monkeypatch.setattr("replknet_paddle.deploy.page.serve", lambda page, listener: None)
        monkeypatch.setattr("replknet_paddle.deploy.page.reserve_port", lambda port: None)
        monkeypatch.setattr("replknet_paddle.commands.predict.signal.signal", lambda *_: None)
    if command in ("erf", "kernels"):
        pytest.importorskip("matplotlib")
    found = {}
    for form in FORMS:
        status = main([*command.split(), form, *USES[command].split()])
        said = capfd.readouterr()
        if form == "exported" and command == "embed":
            assert status == 2 and "exported has a head and gives no features" in said.err
            continue
        if form == "exported" and command in TAKES_WEIGHTS:
            assert status == 2 and "an export folder runs, but its weights cannot" in said.err
            continue
        assert status == 0, (form, said)
        if command in ("eval", "predict", "model-info"):
            found[form] = re.search("top-1 [^,]*|.*%.*|merged.*", said.out)[0]
        for path in folder.glob("new*"):
            if command in ("convert", "merge", "embed"):
                found[form] = path.read_bytes()[-1000:]  # of the tensors
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert len(set(found.values())) <= 1 and len(found) in (0, 4, 5)


@pytest.mark.parametrize("command", ["eval", "predict", "embed", *TAKES_WEIGHTS[:-1]])
def test_a_yaml_file_without_weights_is_refused(command, folder, capfd):
    if command in ("erf", "kernels"):
        pytest.importorskip("matplotlib")
    before = sorted(folder.rglob("*"))
    assert main([*command.split(), "fresh.yaml", *USES[command].split()]) == 2
    assert re.search("error: .*(no weights: MODEL.PRETRAINED is None|without weights)",
                     capfd.readouterr().err)  # fmt: skip
    assert sorted(folder.rglob("*")) == before


def test_random_weights_have_to_be_asked_for(folder):
    opts = ["-opts", "MODEL.PRETRAINED", "random"]
    assert main(["predict", "fresh.yaml", PICTURE, "-backend=paddle", *opts]) == 0
    assert main(["eval", "random", "-cfg=fresh.yaml", "-data_path=data", "-nproc=1"]) == 0


@pytest.mark.parametrize("command", ["eval", "predict", "embed", *TAKES_WEIGHTS, "model-info"])
def test_a_model_that_is_nowhere_is_told_the_nearest_name(command, folder, capfd):
    words = [*command.split(), NAME[:-1], *USES[command].split()]
    assert main(words) == 2
    said = capfd.readouterr().err
    assert f"no model {NAME[:-1]} (tried " in said and f"did you mean {NAME}?" in said
    assert main([*command.split(), "nowhere.yaml", *USES[command].split()]) == 2
    assert "no config file nowhere.yaml" in capfd.readouterr().err


def test_published_names_are_weights_to_start_from(folder, tmp_path):
    flags = ["-data_path=data", "-epochs=1", f"-output={tmp_path / 'tuned'}", "-nproc=1"]
    assert main(["train", "-cfg=fresh.yaml", f"-pretrained={NAME}", *flags]) == 0
    log = (tmp_path / "tuned" / "log.txt").read_text()
    assert re.search(r"loaded \d+ tensors from the .* of .*run/best", log)
    assert "/1, " in log  # epochs


# ---- destinations

TARGETS = {
    "predict": f"run {PICTURE} -backend=eager -output=new.jsonl",
    "predict ": f"run {PICTURE} -backend=eager -save_grid=new.png",
    "predict  ": f"run {PICTURE} -backend=eager -save_pictures=new",
    "predict   ": f"run {PICTURE} -save_heat_maps=new -opts DATA.IMAGE_SIZE 64",
    "eval": "run -data_path=data -nproc=1 -report=new",
    "embed": f"run {PICTURE} -backend=eager -output=new.npy",
    "merge": "run -output=new.safetensors",
    "convert": "run -o new.pdparams",
    "calibrate": "run -data_path=data -backend=eager -o new.safetensors",
    "kernels": "run -output=new.png",
    "plot": "run -output=new.png",
    "check-data": "data -workers=1 -output=new.json",
    "benchmark inference": f"run {INFERENCE} -output=new.json",
    "make-shapes": "new -count=5",
    "make-lists": "data",
}
OPTIONAL = {"kernels": "matplotlib", "plot": "matplotlib"}


@pytest.mark.parametrize("command", TARGETS)
def test_what_is_there_stays_unless_overwrite_is_given(command, folder, capfd):
    pytest.importorskip(OPTIONAL.get(command.strip(), "numpy"))
    words = [*command.split(), *TARGETS[command].split()]

    def snapshot():
        found = [*folder.glob("new*"), *folder.glob("new/**/*")]
        found += folder.glob("data/*.txt") if command == "make-lists" else []
        return {path: (path.stat().st_mtime_ns, path.is_dir()) for path in found}

    if command == "make-lists":
        for path in folder.glob("data/*.txt"):
            path.unlink()
    assert main(words) == 0
    said = "".join(capfd.readouterr())
    assert re.search("^(?:wrote|report: |merged .* into ).*(?:new|data)", said, re.MULTILINE)
    before = snapshot()
    assert before
    assert main(words) == 2
    assert "-overwrite" in capfd.readouterr().err
    assert snapshot() == before
    assert main([*words, "-overwrite"]) == 0
    files = [path for path, (_, is_folder) in before.items() if not is_folder]
    assert all(snapshot()[path] != before[path] for path in files)


@pytest.mark.parametrize("name", ["data", "run", "report"])
def test_a_folder_that_is_no_report_is_never_replaced(name, folder, capfd):
    """Not even one that has a report as well."""
    words = ["eval", "run", "-data_path=data", "-nproc=1"]
    assert main([*words, "-report=report"]) == 0
    (folder / "report" / "mistakes" / "mine.txt").write_text("precious")
    shutil.copy(folder / "report" / "report.html", folder / name / "report.htm")
    (folder / name / "report.htm").rename(folder / name / "report.html")
    before = {path: path.stat().st_mtime_ns for path in (folder / name).rglob("*")}
    assert main([*words, f"-report={name}", "-overwrite"]) == 2
    assert f"folder {name} has {name}/" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (folder / name).rglob("*")} == before


@pytest.mark.parametrize(
    "line, says",
    [
        ("merge run -output=run/best", "must end in .safetensors"),
        ("merge copy.safetensors -output=copy.safetensors", "is the checkpoint itself"),
        ("convert copy.safetensors -output=copy.safetensors", "is the checkpoint itself"),
        ("calibrate copy.safetensors -output=copy.safetensors", "is the checkpoint itself"),
        ("convert copy.safetensors other.safetensors -o x.safetensors", "other.safetensors"),
        ("export run new -o other", "unrecognized arguments: new"),
        ("predict run photo.png -save_grid=photo.png", "photo.png is one of the images"),
        ("predict run photos -save_grid=photos/a.png", "photos/a.png is one of the images"),
        ("eval run -data_path=data -report=photo.png/x", "photo.png is a file"),
        ("train -cfg=fresh.yaml -data_path=data", "-overwrite without -eval"),
    ],
)
def test_overwrite_replaces_nothing_that_is_read(line, says, folder, capfd):
    (folder / "photos").mkdir()
    for name in ("photo.png", "photos/a.png"):
        Image.open(PICTURE).resize((40, 30)).save(folder / name)
    for name in ("copy.safetensors", "other.safetensors"):
        shutil.copy(folder / "run" / "best", folder / name)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    words = [*line.split(), "-overwrite"] if "export" not in line else line.split()
    cfg = ["-cfg=run/config.yaml"] if "copy" in line else []
    try:
        status = main([*words, *cfg])
    except SystemExit as stop:  # argparse
        status = stop.code
    assert status == 2 and says in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_receptive_field_replaces_no_picture_of_another(folder, capfd):
    pytest.importorskip("matplotlib")
    words = ["erf", "run", "data/val", "-num_images=1", "-image_size=32", "-output=new.npy"]
    (folder / "new.png").write_text("precious")
    assert main(words) == 2
    assert "new.png exists" in capfd.readouterr().err
    assert main([*words, "-overwrite"]) == 0
    assert "wrote new.npy, new.png" in capfd.readouterr().out
    assert main(words) == 0  # goes on, with nothing to do


def test_an_evaluation_writes_a_folder_only_where_one_is_named(folder, monkeypatch):
    before = sorted(folder.rglob("*"))
    refused = ["-nproc=2", "-opts", "MODEL.LAYERS", "[2, 1, 1, 1]"]
    for flags in (["-nproc=1"], ["-nproc=2"], refused):
        status = main(["eval", "run", "-data_path=data", *flags])
        assert status == (2 if flags is refused else 0)
        assert sorted(folder.rglob("*")) == before
    assert main(["eval", "run", "-data_path=data", "-nproc=1", "-output=kept"]) == 0
    names = {"lock", "log.txt", "metrics.jsonl", "config.yaml"}
    assert set(os.listdir(folder / "kept")) - {"class_names.txt"} == names


@pytest.mark.parametrize("is_killed", [False, True])
def test_the_output_of_a_killed_process_stays(is_killed, folder, monkeypatch, capfd):
    seen = []

    class Launched:
        def __init__(self, command, *, log_dir, **where):
            seen.append(Path(log_dir))
            os.makedirs(log_dir)

        def wait(self, note):
            said = f"a process was killed; the output of each is in {seen[0]}"
            return (1, said) if is_killed else (0, "")

    monkeypatch.setattr("replknet_paddle.commands.train.LaunchedRun", Launched)
    assert main(["eval", "run", "-data_path=data", "-nproc=2"]) == int(is_killed)
    assert (str(seen[0]) in capfd.readouterr().err) == seen[0].exists() == is_killed
    shutil.rmtree(seen[0].parent, ignore_errors=True)


# ---- examples and old spellings


def test_each_command_has_an_example():
    for name in COMMANDS:
        _, examples = help_of(name)
        assert f"replknet {name}" in examples or "main_multi_gpu.py" in examples, name


def test_spellings_of_0_2_are_told_the_new_ones(folder, capfd):
    assert main(["export", "-pretrained", "run/best", "--format", "paddle", "new"]) == 0
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith("note: -pretrained of replknet export is now MODEL, the first argum")
    assert said[1].startswith("note: the argument DST of replknet export is now -output; see ")
    assert (folder / "new" / "export.json").exists()
