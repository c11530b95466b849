"""`replknet predict`: results, pictures, statuses, and bad input of every kind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import make_run
from PIL import Image
from tiny import PICTURES, ROOT, command, table

from replknet_paddle import deploy
from replknet_paddle.deploy.drawing import RIGHT, WRONG, annotate, save
from replknet_paddle.deploy.export import ModelInfo
from replknet_paddle.deploy.images import decode
from replknet_paddle.deploy.page import look
from replknet_paddle.zoo import open_network

main = command("predict")

MERGED = ["MODEL.SMALL_KERNEL_MERGED", "True"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), classes=9)


@pytest.fixture(scope="module")
def export(run_folder, tmp_path_factory):
    network = open_network(run_folder)
    folder = tmp_path_factory.mktemp("exports") / "export"
    names = tuple(f"class {letter}" for letter in "abcdefghi")
    deploy.export_model(network, folder, ModelInfo(network.config, class_names=names))
    return folder


@pytest.fixture
def photos(tmp_path):
    """A folder as people have them: 3 pictures, 2 of them of one name, and what is none."""
    folder = tmp_path / "photos"
    for name in ("a/picture.png", "b/picture.png", "c.JPG"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(PICTURES[len(name) % len(PICTURES)]) as image:
            image.convert("RGB").save(folder / name)
    (folder / "notes.txt").write_text("seen in May")
    (folder / "broken.jpg").write_bytes(Path(PICTURES[1]).read_bytes()[:900])
    return folder


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_are_those_of_inference_model(run_folder, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    flags = ["-backend", "eager", "--topk", "3", "-output", str(out)]
    assert main([str(run_folder), *PICTURES, *flags]) == 0
    expected = deploy.inference_model(open_network(run_folder), PICTURES)
    for record, path, result in zip(records(out), PICTURES, expected, strict=True):
        assert record["path"] == path
        assert record["pred_label"] == result["pred_label"]
        assert record["pred_score"] == pytest.approx(result["pred_score"], rel=1e-4)
        order = np.argsort(-result["pred_scores"])[:3]
        assert [entry["label"] for entry in record["topk"]] == list(order)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(f"classified {len(PICTURES)} images, skipped 0\nwrote {out}\n")


def test_an_export_is_all_it_takes_and_brings_the_names_of_the_classes(export, tmp_path):
    out = tmp_path / "results.csv"
    assert main([str(export), PICTURES[0], "-output", str(out), "--topk", "100"]) == 0
    (row,) = table(out)
    assert sorted(row[f"class_{i}"] for i in range(1, 10)) == [f"class {c}" for c in "abcdefghi"]
    assert "class_10" not in row
    assert sum(float(row[f"score_{i}"]) for i in range(1, 10)) == pytest.approx(1, abs=1e-5)


def test_a_folder_is_classified_and_what_does_not_decode_is_skipped_and_reported(
    run_folder, photos, tmp_path, capsys
):
    out = tmp_path / "results.jsonl"
    assert main([str(run_folder), str(photos), "-output", str(out), "-backend", "eager"]) == 1
    by_path = {record["path"]: record for record in records(out)}
    assert len(by_path) == 4
    assert "truncated" in by_path[str(photos / "broken.jpg")]["problem"]
    assert "pred_label" in by_path[str(photos / "c.JPG")]
    error = capsys.readouterr().err
    assert "classified 3 images, skipped 1, passed over 1 file not named as images are (1 " in error
    assert f"  {photos / 'broken.jpg'}: " in error


def test_without_a_file_the_results_are_printed_alone(run_folder, photos):
    """Paddle prints to standard output as well, from C++."""
    command_line = ["-m", "replknet_paddle", "predict", str(run_folder), str(photos), "--topk=2"]
    done = subprocess.run(
        [sys.executable, *command_line],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert [line.split(": ")[0] for line in lines] == sorted(
        str(photos / name) for name in ("a/picture.png", "b/picture.png", "c.JPG", "broken.jpg")
    )
    assert sum(line.count(" %") for line in lines) == 6


def test_a_merged_checkpoint_is_predicted_with_its_configuration(run_folder, tmp_path):
    merged, out = tmp_path / "merged.safetensors", tmp_path / "results.jsonl"
    assert command("merge")([str(run_folder), "-output", str(merged)]) == 0
    flags = ["-cfg", str(run_folder / "config.yaml"), "-backend", "eager", "-output", str(out)]
    assert main([str(merged), *PICTURES, *flags, "-opts", *MERGED]) == 0
    expected = deploy.inference_model(open_network(run_folder), PICTURES)
    for record, result in zip(records(out), expected, strict=True):
        assert record["pred_label"] == result["pred_label"]
        assert record["pred_score"] == pytest.approx(result["pred_score"], rel=1e-3)


def test_names_cannot_command_the_terminal(run_folder, tmp_path, capsys):
    path = tmp_path / "\x1b[31mred\n.png"
    Image.new("RGB", (40, 40)).save(path)
    assert main([str(run_folder), str(tmp_path), "-backend", "eager"]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err and len(captured.out.splitlines()) == 1
    assert "\\x1b[31mred\\n.png" in captured.out


def test_saved_pictures_are_one_for_each_and_touch_no_input(run_folder, photos, tmp_path):
    before = snapshot(photos)
    drawn, grid = photos / "drawn", tmp_path / "grid.png"  # within what is searched, and beside it
    flags = ["--save-pictures", str(drawn), "--save-grid", str(grid), "-backend", "eager"]
    assert main([str(run_folder), str(photos), *flags]) == 1
    assert {path: content for path, content in snapshot(photos).items() if path in before} == before
    names = sorted(path.name for path in drawn.iterdir())
    assert [name[:7] for name in names] == ["000001_", "000002_", "000003_"]
    assert sorted(name[7:] for name in names) == ["c.jpg", "picture.jpg", "picture.jpg"]
    for path in drawn.iterdir():
        with Image.open(path) as image:
            assert image.format == "JPEG" and image.size == (1440, 480)
    with Image.open(grid) as image:
        assert image.size == (3 * 480, 160)
        cells = np.split(np.asarray(image.convert("L")), 3, axis=1)
    assert all(cell[:, :240].std() > 20 for cell in cells)  # pictures, rather than white


@pytest.mark.parametrize("batch_size", [1, 4])
def test_heat_maps_are_the_pages_and_change_no_prediction(photos, tmp_path, batch_size):
    run, maps = make_run(tmp_path, image_size=64, classes=9), photos / "maps"
    for name, flag in (("bare", "-backend=eager"), ("mapped", f"-save_heat_maps={maps}")):
        flags = [flag, f"-batch_size={batch_size}", f"-output={tmp_path / name}.jsonl"]
        assert main([str(run), str(photos), *flags]) == 1
    assert (tmp_path / "bare.jsonl").read_bytes() == (tmp_path / "mapped.jsonl").read_bytes()
    images = [one for one in records(tmp_path / "mapped.jsonl") if "pred_label" in one]
    predictor = deploy.Predictor(run, backend="eager")
    for number, record in enumerate(images, start=1):
        path, picture = Path(record["path"]), decode(record["path"])
        answers = ([entry[key] for entry in record["topk"]] for key in ("class", "score"))
        caption, heat = f"{path.parent.name}/{path.name}", look(predictor, path).heat
        drawn = annotate(picture, *answers, caption=caption, height=480, heat=heat)
        save(drawn, tmp_path / "expected.jpg")
        found = (maps / f"{number:06d}_{path.stem}.jpg").read_bytes()
        assert found == (tmp_path / "expected.jpg").read_bytes()
    assert number == len(os.listdir(maps)) == 3


def test_folders_named_as_classes_say_what_is_right(run_folder, tmp_path, capsys):
    """Every picture lies once in the folder of its predicted class, and once in another."""
    names = [f"class {letter}" for letter in "abcdefghi"]
    named = tmp_path / "run"
    named.mkdir()
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    settings = (run_folder / "config.yaml").read_text()
    settings = settings.replace("DATA:", f"DATA:\n  CLASS_NAMES: {tmp_path / 'names.txt'}")
    (named / "config.yaml").write_text(settings)
    (named / "best").write_bytes((run_folder / "best").read_bytes())
    results = deploy.inference_model(open_network(run_folder), PICTURES[:3])
    for result, path in zip(results, PICTURES):
        label = result["pred_label"]
        for i, name in enumerate((names[label], names[(label + 1) % 9], "elsewhere")):
            folder = tmp_path / "photos" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i} {Path(path).name}").write_bytes(Path(path).read_bytes())
    grid = tmp_path / "grid.png"
    flags = ["-backend=eager", "--save-grid", str(grid)]
    assert main([str(named), str(tmp_path / "photos"), *flags]) == 0
    assert "right: 3 of 6 in folders named as classes (50.00 %)" in capsys.readouterr().err
    with Image.open(grid) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == RIGHT).all(axis=-1).sum() > 300 < (pixels == WRONG).all(axis=-1).sum()
    limit = sorted(result["pred_score"] for result in results)[1]
    assert main([str(named), str(tmp_path / "photos"), flags[0], f"-reject={limit}"]) == 0
    assert "right: 2 of 4 accepted in folders named as classes" in capsys.readouterr().err


def test_a_list_brings_the_true_classes(run_folder, tmp_path, monkeypatch, capsys):
    labels = [r["pred_label"] for r in deploy.inference_model(open_network(run_folder), PICTURES)]
    labels[0] = (labels[0] + 1) % 9
    for i, path in enumerate(PICTURES):
        (tmp_path / f"{i}").write_bytes(Path(path).read_bytes())
    lines = [*(f"{i} {label}\n" for i, label in enumerate(labels)), "gone 4\n", "bad line\n"]
    (tmp_path / "list.txt").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    assert main([str(run_folder), "list.txt", "-output=r.jsonl", "-backend=eager"]) == 1
    read = records(Path("r.jsonl"))
    assert [r["path"] for r in read[:-1]] == [*map(str, range(len(PICTURES))), "gone"]
    assert [r["true_label"] for r in read[:-1]] == [*labels, 4]
    assert read[-2]["true_class"] == "4" and read[-2]["problem"] == "no such file or directory"
    assert read[-1]["path"] == f"list.txt, line {len(labels) + 2}"
    assert "true_label" not in read[-1]
    said = "skipped 2\nright: 7 of 8 whose class the list or the folder names (87.50 %)\n"
    assert said in capsys.readouterr().err


def test_numbers_as_names_of_folders_say_nothing(run_folder, photos, capsys):
    """A model without class names has their numbers, which folders of years also are."""
    (photos / "a").rename(photos / "5")
    assert main([str(run_folder), str(photos), "-backend=eager"]) == 1
    assert "in folders named as classes" not in capsys.readouterr().err


def test_an_interruption_says_where_the_results_are(run_folder, tmp_path, monkeypatch, capsys):
    class Interrupted:
        def __init__(self, *_):
            self.count = 0

        def add(self, prediction):
            self.count += 1
            if self.count == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr("replknet_paddle.commands.predict.Summary", Interrupted)
    out = tmp_path / "r.jsonl"
    flags = ["-output", str(out), "-backend", "eager"]
    assert main([str(run_folder), *PICTURES, *flags]) == 130
    assert f"interrupted; the results so far are in {out}.unfinished" in capsys.readouterr().err
    assert len(records(tmp_path / "r.jsonl.unfinished")) == 2 and not out.exists()


def test_a_reader_that_has_seen_enough_ends_it_quietly(run_folder, monkeypatch, capsys):
    def closed(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("replknet_paddle.commands.predict.print_prediction", closed)
    assert main([str(run_folder), *PICTURES, "-backend", "eager"]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_files_take_no_more_memory_than_few(run_folder, tmp_path):
    """The peak of 2,000 files in one folder against that of 200, in a process of their own."""
    for name, count in (("few", 200), ("many", 2000)):
        (tmp_path / name).mkdir()
        small = tmp_path / name / "0.png"
        Image.fromarray(np.zeros((64, 64, 3), "uint8")).save(small)
        for i in range(1, count):
            os.link(small, tmp_path / name / f"{i}.png")
    code = """
import resource, sys
from replknet_paddle.commands import run_command
for name in ("few", "many"):
    assert run_command("predict", [sys.argv[1], f"{sys.argv[2]}/{name}", "-backend=eager",
        f"-output={sys.argv[2]}/{name}.jsonl", "-batch_size=50"]) == 0
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_folder), str(tmp_path)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    few_kib, many_kib = map(int, done.stdout.split())
    # A preprocessed image is 12 KiB: kept, 1,800 of them would take 21 MiB.
    assert many_kib - few_kib < 10 * 1024
