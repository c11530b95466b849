"""`-pretrained` on the command line, with every reference file."""

import json
from pathlib import Path

import pytest
from tiny import command

main = command("train")


FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
REFERENCE_FILES = sorted(path.name for path in FIXTURES.glob("tiny*.p[td]*"))


@pytest.fixture
def evaluate(config_file, tiny_data, tmp_path):
    """Runs the evaluation of a file; gives the exit status and the metrics."""

    def run(file_name: str, *flags: str, **keys) -> tuple[int, dict]:
        cfg = config_file(file_name.split("_")[0], **keys)
        output = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        status = main(
            [
                f"-cfg={cfg}",
                f"-data_path={tiny_data}",
                "-batch_size=101",
                "-eval",
                f"-pretrained={FIXTURES / file_name}",
                f"-output={output}",
                *flags,
            ]
        )
        metrics = output / "metrics.jsonl"
        return status, json.loads(metrics.read_text().splitlines()[-1]) if status == 0 else {}

    return run


@pytest.mark.parametrize("file_name", REFERENCE_FILES)
def test_every_reference_file_can_be_evaluated(file_name, evaluate):
    keys = {"SMALL_KERNEL_MERGED": True} if "merged" in file_name else {}
    status, metrics = evaluate(file_name, **keys)
    assert status == 0 and metrics["val_loss"] > 0


def test_weights_and_their_average_give_different_results(evaluate):
    name = "tiny31_official_train_ckpt.pth"
    losses = {
        weights: evaluate(name, "-opts", "MODEL.PRETRAINED_WEIGHTS", weights)[1]["val_loss"]
        for weights in ("model", "model_ema")
    }
    plain = evaluate("tiny31_official.pth")[1]["val_loss"]
    assert losses["model"] == pytest.approx(plain, rel=1e-6)
    assert losses["model_ema"] != pytest.approx(plain, rel=1e-3)


def test_file_that_does_not_fit_is_reported_without_a_traceback(evaluate, capsys):
    status, _ = evaluate("tiny31_official_merged.pth")
    assert status == 2
    error = capsys.readouterr().err
    assert "set MODEL.SMALL_KERNEL_MERGED: True" in error and "Traceback" not in error
