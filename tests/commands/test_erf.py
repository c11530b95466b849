"""`replknet erf` and `replknet kernels`: pictures, tables, and a killed run that goes on."""

import os
import shutil
import signal
import time
from unittest import mock

import numpy as np
import pytest
from harness import Run, wait_for
from PIL import Image
from tiny import FIXTURES, command

from replknet_paddle.analysis import receptive_field
from replknet_paddle.analysis.receptive_field import contribution_scores, load_field
from replknet_paddle.checkpoints.load import load_pretrained

pytest.importorskip("matplotlib", reason="optional: requirements/plots.txt")

erf, kernels = command("erf"), command("kernels")
WEIGHTS = FIXTURES / "tiny31_official.pth"
SIZE = 64
COUNT = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of noise of several sizes, one in a folder below."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "a").mkdir()
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        pixels = rng.integers(0, 256, (50 + 5 * i, 80, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / ("a" if i == 0 else "") / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def flags(config_file):
    cfg = str(config_file("tiny31"))
    return ["-cfg", cfg, "-image_size", str(SIZE)]


def arguments(folder, flags, out, num_images=COUNT):
    return [str(WEIGHTS), str(folder), *flags, "-num_images", str(num_images), "-output", str(out)]


def assert_picture(path, panels):
    """A picture with something in it, as wide as so many panels and a colour bar are."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == (4 * panels + 1) * 120
        assert len(image.convert("RGB").getcolors(1 << 24)) > 200


def test_a_folder_gives_the_array_the_table_and_the_picture(
    folder, flags, tmp_path, capsys, network
):
    out = tmp_path / "nano.npy"
    assert erf(arguments(folder, flags, out, num_images=3)) == 0
    field = load_field(out)
    assert field.images == ["1.png", "2.png", "3.png"]  # sorted by path: a/0.png is last
    model = network("tiny31")
    load_pretrained(model, WEIGHTS)
    expected = np.mean([official_preparation(model, folder / name) for name in field.images], 0)
    assert np.linalg.norm(field.scores - expected) < 0.02 * np.linalg.norm(expected)
    printed = capsys.readouterr().out
    (row,) = (line for line in printed.splitlines() if line.startswith("nano"))
    assert row.split()[1:3] == ["3", "0"]
    assert all(f"{share}%" in printed for share in (20, 30, 50, 99))
    assert_picture(tmp_path / "nano.png", panels=1)


def official_preparation(model, path):
    """Scores of an image prepared as the official script does: bicubic to a square, ImageNet's
    mean and standard deviation."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.BICUBIC), np.float32)
    normalized = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return contribution_scores(model, normalized.transpose(2, 0, 1).astype(np.float32))


def test_fields_by_products_are_those_by_the_compiled_operator(folder, flags, tmp_path, operators):
    """Image by image: a rounding error that turns a ReLU on or off moves a field by percents, which
    ones depends on the processor."""
    deviations = []
    for name in ("1.png", "2.png", "3.png"):
        (tmp_path / name).mkdir()
        shutil.copy(folder / name, tmp_path / name)
        fields = []
        for impl in ("matmul", "auto"):
            out = tmp_path / f"{name} {impl}.npy"
            chosen = [*flags, "-opts", "MODEL.CONV_IMPL", impl]
            assert erf(arguments(tmp_path / name, chosen, out, num_images=1)) == 0
            fields.append(load_field(out).scores)
        assert not np.array_equal(*fields)
        deviations.append(np.linalg.norm(fields[0] - fields[1]) / np.linalg.norm(fields[1]))
    assert min(deviations) < 1e-5 and max(deviations) < 0.1


def test_fields_are_compared_side_by_side(folder, flags, tmp_path, capsys):
    first = tmp_path / "first.npy"
    assert erf(arguments(folder, flags, first, num_images=2)) == 0
    uniform = tmp_path / "uniform.npy"
    np.save(uniform, np.ones((1024, 1024), np.float32))  # as the official script saves
    both = tmp_path / "both.png"
    capsys.readouterr()
    assert erf([str(first), str(uniform), "-output", str(both)]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert " ".join(rows["uniform"]) == "- - 459 20.1% 561 30.0% 725 50.1% 1019 99.0%"
    assert rows["first"][:2] == ["2", "0"]
    assert_picture(both, panels=2)


def slow_erf(arguments) -> int:
    """The command, which waits before each image, so that a signal comes between two of them."""
    scores = receptive_field.contribution_scores
    receptive_field.contribution_scores = lambda *given: (time.sleep(0.5), scores(*given))[1]
    return erf(arguments)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_array(folder, flags, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole.npy", tmp_path / "killed.npy"
    run = Run(arguments(folder, flags, killed), output=tmp_path / "killed.txt", target=slow_erf)
    wait_for(lambda: killed.exists() or run.process.exitcode is not None, timeout=300)
    run.send(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, run.text()
    done = len(load_field(killed).images)
    assert 1 <= done < COUNT
    assert not (tmp_path / "killed.png").exists()
    scores = mock.Mock(side_effect=contribution_scores)
    monkeypatch.setattr(receptive_field, "contribution_scores", scores)
    for out in (killed, killed, whole):
        assert erf(arguments(folder, flags, out)) == 0
    assert scores.call_count == COUNT - done + COUNT  # nothing is computed twice
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: [*a, "-num_images", "9"], "there are 8 images; 9 are needed"),
        (lambda a: [*a, "-num_images", "0"], "-num_images is 0"),
        (lambda a: [*a, "-image_size", "16"], "-image_size is 16"),
        (lambda a: [*a, "-output", "x.npz"], "must end in .npy"),
        (lambda a: ["none.pth", *a[1:]], "none.pth"),
        (lambda a: a[:1], "0 folders of images; allowed: one"),
        (lambda a: [*a, a[1]], "2 folders of images; allowed: one"),
        (lambda a: ["none.npy"], ".npy file none.npy"),
        (lambda a: [a[1], *a[1:]], "is a folder without a checkpoint"),
        (lambda a: [a[0], str(FIXTURES), *a[2:], "-opts", "MODEL.NUM_CLASSES", "3"], "not fit"),
    ],
)
def test_bad_input_is_one_message(change, message, folder, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert erf(change(arguments(folder, flags, tmp_path / "erf.npy"))) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert os.listdir(tmp_path) == []


def test_an_unreadable_image_is_named(folder, flags, tmp_path, capsys):
    broken = tmp_path / "images"
    broken.mkdir()
    (broken / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])
    assert erf(arguments(broken, flags, tmp_path / "erf.npy", num_images=1)) == 2
    assert f"{broken / '1.png'}: damaged" in capsys.readouterr().err


def test_kernels_are_drawn_by_stage(config_file, tmp_path, network):
    from replknet_paddle.analysis.plots import kernel_magnitudes

    cfg, out = str(config_file("tiny31")), tmp_path / "kernels.png"
    assert kernels(["-cfg", cfg, str(WEIGHTS), "-output", str(out)]) == 0
    assert_picture(out, panels=4)

    model = network("tiny31")
    load_pretrained(model, WEIGHTS)
    with pytest.raises(ValueError, match="not merged"):
        kernel_magnitudes(model)
    model.structural_reparam()
    magnitudes = kernel_magnitudes(model)
    assert [m.shape for m in magnitudes] == [(31, 31), (29, 29), (27, 27), (13, 13)]
    # By hand, at one position of the third stage, which has two blocks.
    weights = [
        model.stages[2].blocks[i].large_kernel.large_kernel_reparam.weight.numpy() for i in (0, 2)
    ]
    absolute = np.mean([np.abs(w[:, 0]).mean(axis=0) for w in weights], axis=0)
    np.testing.assert_allclose(magnitudes[2][13, 4], absolute[13, 4] / absolute.max(), rtol=1e-6)
    assert all(m.max() == 1 for m in magnitudes)
    # The parallel 5 x 5 kernels are part of them.
    assert np.unravel_index(magnitudes[0].argmax(), (31, 31))[0] in range(13, 18)
