"""No command contacts another machine, whatever backend it runs: no name is looked up.

Seen below Python, by a library that is preloaded, since ONNX Runtime sends from C++. The packages
that send notice a CI by its variables and send nothing there, so these are taken away.
"""

import os
import signal
import subprocess
import sys

import pytest
from harness import free_ports, make_run
from tiny import FIXTURES, ROOT, TINY, make_data

from replknet_paddle.deploy.backends import BACKENDS
from replknet_paddle.runtime.compiler import BuildError, find_compiler
from replknet_paddle.runtime.files import cache_folder

# Twenty command lines take half a minute.
pytestmark = pytest.mark.slow

PICTURE = FIXTURES / "images" / "landscape_499x375.jpg"
EVAL = "eval -data_path=data -output=evaluated"

# Command lines after `replknet`, in a folder with a run `made`, tiny.yaml and data.
COMMANDS = [
    "export made -output paddle",
    "export made -output onnx -format onnx",
    "export made -output int8 -format onnx -precision int8 -data_path=data",
    "benchmark inference tiny.yaml -rounds 1 -batch_sizes 1",
    "model-info tiny.yaml",
    "train -cfg=tiny.yaml -data_path=data -output=run -opts TRAIN.NUM_EPOCHS 1 "
    "TRAIN.WARMUP_EPOCHS 0",
    *(f"predict made {PICTURE} -backend={name}" for name in BACKENDS),
    *(f"{EVAL} -pretrained=made -backend={name}" for name in BACKENDS),
    f"predict int8 {PICTURE}",
    f"{EVAL} -pretrained=int8",
]

# In one process, since each import takes seconds.
PROGRAM = """
import shlex, sys
from replknet_paddle.commands import main
for line in sys.argv[1:]:
    print(line, flush=True)
    if main(shlex.split(line)):
        sys.exit(1)
"""


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Gives what starts Python in a folder of files, watched; at the end, nothing was looked up."""
    for package in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    library, noted, home = tmp_path / "lookups.so", tmp_path / "lookups.txt", tmp_path / "home"
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    source = ROOT / "tests" / "lookups.c"
    subprocess.run(
        [*compiler, "-x", "c", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True
    )
    home.mkdir()
    (tmp_path / "made").mkdir()
    make_run(tmp_path / "made")
    (tmp_path / "tiny.yaml").write_text(TINY)
    make_data(tmp_path / "data", train=16, val=8)
    own = {"LD_PRELOAD": library, "LOOKUPS": noted, "HOME": home, "OMP_NUM_THREADS": "1"}
    own |= {"PYTHONPATH": ROOT, "REPLKNET_PADDLE_CACHE": cache_folder()}
    environment = {
        name: value
        for name, value in os.environ.items()
        if not any(word in name for word in ("CI", "GITHUB", "BUILD", "TELEMETRY", "ANALYTICS"))
    } | {name: str(value) for name, value in own.items()}

    def start(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=tmp_path, text=True, env=environment, stdout=subprocess.PIPE
        )

    # It sees what it is to see.
    start("-c", "import socket; socket.getaddrinfo('192.0.2.1', 80)").communicate()
    assert noted.read_text() == "192.0.2.1\n"
    noted.unlink()
    yield start
    assert not noted.exists(), noted.read_text()
    # The numbers by which the packages that send know a user again.
    assert not (home / "intel").exists() and not list(home.rglob("deviceid"))


def test_no_command_contacts_another_machine(watched):
    process = watched("-c", PROGRAM, *COMMANDS)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said


def test_the_page_contacts_no_other_machine(watched):
    pytest.importorskip("gradio")
    process = watched("-m", "replknet_paddle", "page", "made", f"--port={free_ports(1)[0]}")
    try:
        assert "http://127.0.0.1" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
