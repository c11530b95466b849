"""The command line that prints a network's figures."""

import os
import subprocess
import sys

import paddle
import pytest
from paddle import nn
from tiny import ROOT, command

from replknet_paddle import model as replknet

main = command("model-info")


def figures(text):
    """{form: (parameters, multiply-adds)} of what was printed."""
    rows = {}
    for line in text.splitlines():
        form, *numbers = line.split()
        if form in ("train", "merged"):
            rows[form] = tuple(int(number.replace(",", "")) for number in numbers)
    return rows


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "replknet_paddle", "model-info", *map(str, arguments)],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_figures_of_31b_are_the_papers(capsys, monkeypatch):
    zeros = paddle.ParamAttr(initializer=nn.initializer.Constant(0.0))  # in no time
    monkeypatch.setattr(replknet, "uniform", lambda fan_in: zeros)
    assert main(["-cfg", str(ROOT / "configs" / "replknet_31b.yaml")]) == 0
    printed = capsys.readouterr().out
    assert figures(printed) == {
        "train": (79_864_168, 15_431_298_048),
        "merged": (79_527_272, 15_353_525_248),
    }
    assert "replknet_31b" in printed and "224" in printed and "1000" in printed


@pytest.mark.slow
def test_the_command_runs_from_the_shell(tiny_config_file):
    done = run("-cfg", tiny_config_file)
    assert done.returncode == 0, done.stderr
    assert figures(done.stdout).keys() == {"train", "merged"}


def test_other_keys_count(tiny_config_file, capsys):
    printed = []
    for opts in ([], ["DATA.IMAGE_SIZE", "64"], ["MODEL.NUM_CLASSES", "5"]):
        arguments = ["-opts", *opts] if opts else []
        assert main(["--cfg", str(tiny_config_file), *arguments]) == 0
        printed.append(figures(capsys.readouterr().out))
    plain, larger, wider = printed
    assert larger["train"][0] == plain["train"][0]
    assert 3 < larger["train"][1] / plain["train"][1] <= 4
    assert wider["train"][0] == plain["train"][0] + 11 and wider["train"][1] == (
        plain["train"][1] + 10
    )


def test_a_merged_or_single_kernel_network_prints_what_it_is(tiny_config_file, capsys):
    assert main(["-cfg", str(tiny_config_file)]) == 0
    both = figures(capsys.readouterr().out)
    opts = ["-opts", "MODEL.SMALL_KERNEL_MERGED", "True"]
    assert main(["-cfg", str(tiny_config_file), *opts]) == 0
    assert figures(capsys.readouterr().out) == {"merged": both["merged"]}
    assert main(["-cfg", str(tiny_config_file), "-opts", "MODEL.SMALL_KERNEL", "None"]) == 0
    single = figures(capsys.readouterr().out)
    assert single["merged"] == both["merged"]
    assert single["train"][1] == single["merged"][1]
    assert main(["-cfg", str(tiny_config_file), "-opts", "MODEL.OUT_INDICES", "[0, 3]"]) == 0
    assert figures(capsys.readouterr().out).keys() == {"train", "merged"}


@pytest.mark.slow
def test_bad_input_ends_with_status_2_and_no_traceback(tmp_path):
    done = run("-cfg", tmp_path / "nowhere.yaml")
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: no config file {tmp_path}")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["-opts", "MODLE.NAME", "x"], "did you mean MODEL.NAME?"),
        (["-opts", "MODEL.LARGE_KERNEL_SIZES", "[30, 29, 27, 13]"], "odd"),
        (["-opts", "SEED"], "SEED has no value"),
        (["-cfg", "."], "'.'"),
    ],
)
def test_a_wrong_config_is_one_message(tiny_config_file, capsys, arguments, says):
    assert main(["-cfg", str(tiny_config_file), *arguments]) == 2
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert captured.out == "" and line.startswith("error: ") and says in line
