"""The command line that prints a network's figures."""

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


def test_figures_of_31b_are_the_papers(capsys, monkeypatch):
    zeros = paddle.ParamAttr(initializer=nn.initializer.Constant(0.0))  # in no time
    monkeypatch.setattr(replknet, "uniform", lambda fan_in: zeros)
    assert main([str(ROOT / "configs" / "replknet_31b.yaml")]) == 0
    printed = capsys.readouterr().out
    assert figures(printed) == {
        "train": (79_864_168, 15_431_298_048),
        "merged": (79_527_272, 15_353_525_248),
    }
    assert "replknet_31b" in printed and "224" in printed and "1,000 classes" in printed


@pytest.fixture
def figures_with(tiny_config_file, capsys):
    """What is printed for keys and values over the tiny configuration."""

    def figures_of(*opts):
        assert main([str(tiny_config_file), *(["-opts", *opts] if opts else [])]) == 0
        return figures(capsys.readouterr().out)

    return figures_of


def test_other_keys_count(figures_with):
    plain, larger, wider = (
        figures_with(*opts)["train"]
        for opts in ((), ("DATA.IMAGE_SIZE", "64"), ("MODEL.NUM_CLASSES", "5"))
    )
    assert larger[0] == plain[0] and 3 < larger[1] / plain[1] <= 4
    assert wider == (plain[0] + 11, plain[1] + 10)


def test_a_merged_or_single_kernel_network_prints_what_it_is(figures_with):
    both = figures_with()
    assert both.keys() == {"train", "merged"}
    assert figures_with("MODEL.SMALL_KERNEL_MERGED", "True") == {"merged": both["merged"]}
    single = figures_with("MODEL.SMALL_KERNEL", "None")
    assert single["merged"] == both["merged"] and single["train"][1] == single["merged"][1]
    assert figures_with("MODEL.OUT_INDICES", "[0, 3]").keys() == {"train", "merged"}


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["-opts", "MODLE.NAME", "x"], "did you mean MODEL.NAME?"),
        (["-opts", "MODEL.LARGE_KERNEL_SIZES", "[30, 29, 27, 13]"], "odd"),
        (["-opts", "SEED"], "SEED has no value"),
        (["."], "carries no configuration"),
        (["nowhere.yaml"], "no config file nowhere.yaml"),
    ],
)
def test_a_wrong_config_is_one_message(tiny_config_file, capsys, arguments, says):
    model = [str(tiny_config_file)] if "-opts" in arguments else []
    assert main([*model, *arguments]) == 2
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert captured.out == "" and line.startswith("error: ") and says in line
