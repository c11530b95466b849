"""`paddle.hub` on this repository, from another folder that has its own modules of our names."""

import json
import subprocess
import sys

import pytest
from tiny import FIXTURES, ROOT

from replknet_paddle.config import CONFIG_FOLDER
from replknet_paddle.zoo.records import MODELS

pytestmark = pytest.mark.paddle_version

ENTRIES = {
    "replknet_31b",
    "replknet_31b_384",
    "replknet_31b_22k1k_224",
    "replknet_31b_22k1k_384",
    "replknet_31l_22k1k_384",
    "replknet_xl",
    "replknet_31b_22k",
    "replknet_31l_22k_384",
}


@pytest.fixture
def run(tmp_path):
    """Runs Python code in a fresh process in a folder of modules named like ours; what it prints
    last, as JSON."""
    for name in ("config", "datasets", "replknet", "hub_helpers"):
        (tmp_path / f"{name}.py").write_text(f"OWN = {name!r}\n")

    def run(code):
        done = subprocess.run(
            [sys.executable, "-c", f"import json, paddle\nREPO = {str(ROOT)!r}\n{code}"],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_there_is_an_entry_for_each_published_model(run):
    entries, help_text = run(
        "print(json.dumps([paddle.hub.list(REPO, source='local'),"
        " paddle.hub.help(REPO, 'replknet_xl', source='local')]))"
    )
    assert len(entries) == 8 and set(entries) == ENTRIES
    assert len(MODELS) == 8
    assert all((CONFIG_FOLDER / f"{name}.yaml").is_file() for name in ENTRIES)
    assert "replknet-xl-73m1k-320" in help_text and "pretrained" in help_text


def test_models_load_beside_the_users_own_modules(run, tmp_path):
    """Fresh, from a file that the test writes, and from one that does not fit."""
    own, parameters, training, loaded, message = run(
        f"""
import config, datasets, replknet
def load(pretrained, **options):
    return paddle.hub.load(REPO, "replknet_31b", source="local", pretrained=pretrained, **options)
model = load(False, num_classes=10)
trainable = sum(int(p.size) for p in model.parameters() if not p.stop_gradient)
model.head.bias.set_value(paddle.full([10], 7.0))
state = model.state_dict()
paddle.save(state, {str(tmp_path / "w.pdparams")!r})
again = load({str(tmp_path / "w.pdparams")!r}, num_classes=10).state_dict()
loaded = all(bool((value == again[name]).all()) for name, value in state.items())
try:
    load({str(FIXTURES / "tiny31_official.pth")!r})
except ValueError as error:
    message = str(error)
import config as again
own = [config.OWN, datasets.OWN, replknet.OWN, again.OWN]
print(json.dumps([own, trainable, model.training, loaded, message]))
"""
    )
    assert own == ["config", "datasets", "replknet", "config"]
    assert parameters == 79_864_168 - 990 * 1025 and training is False
    assert loaded
    assert "does not fit the network" in message
