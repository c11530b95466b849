"""setup_env.sh: the Paddle that it chooses for a machine's GPUs, and what it does if that fails."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from tiny import ROOT

INDEX = "https://www.paddlepaddle.org.cn/packages/stable"

GTX_1080 = "6.1, 535.104.05, NVIDIA GeForce GTX 1080"
V100 = "7.0, 450.80.02, Tesla V100-SXM2-16GB"
A100 = "8.0, 525.60.13, NVIDIA A100-SXM4-80GB"
RTX_3090 = "8.6, 535.104.05, NVIDIA GeForce RTX 3090"
RTX_4090 = "8.9, 550.54.14, NVIDIA GeForce RTX 4090"
H100 = "9.0, 535.104.05, NVIDIA H100 80GB HBM3"
B200 = "10.0, 570.86.10, NVIDIA B200"
RTX_5090 = "12.0, 570.86.10, NVIDIA GeForce RTX 5090"


class Machine:
    """A folder with a checkout's set-up, a scripted nvidia-smi, and an index of Paddle's builds.

    The index holds a stand-in for `paddlepaddle-gpu`, whose "GPU" computes as the variable FAKE_GPU
    says. All other packages are those of the environment of these tests.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkout = folder / "checkout"
        self.venv = folder / "venv"
        self.index = folder / "index"
        self.checkout.mkdir()
        for name in ("setup_env.sh", "setup.py", "pyproject.toml", "requirements.txt", "README.md"):
            shutil.copy(ROOT / name, self.checkout)
        for name in ("requirements", "configs", "replknet_paddle"):
            shutil.copytree(ROOT / name, self.checkout / name)
        (folder / "bin").mkdir()

    def has_gpus(self, *gpus: str) -> None:
        """What nvidia-smi lists; nothing and a failure where there are none."""
        script = self.folder / "bin" / "nvidia-smi"
        listed = "\n".join(f"echo '{gpu}'" for gpu in gpus)
        script.write_text(f"#!/bin/sh\n{listed or 'exit 9'}\n")
        script.chmod(0o755)

    def has_environment(self) -> None:
        """A virtual environment that borrows what these tests have installed."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.venv], check=True)
        site = next((self.venv / "lib").glob("python*/site-packages"))
        (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def has_index(self, *builds: str) -> None:
        """Folders of Paddle's index with the stand-in, in pip's layout."""
        for build in builds:
            folder = self.index / build / "paddlepaddle-gpu"
            folder.mkdir(parents=True)
            make_stand_in(folder / WHEEL)
            (folder / "index.html").write_text(f'<a href="{WHEEL}">{WHEEL}</a>')

    def sh(self, *arguments, **variables):
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "VENV": str(self.venv),
            "PYTHON": None,
            "PIP_INDEX_URL": f"file://{self.folder}/nothing",
            "PIP_EXTRA_INDEX_URL": None,
            "PIP_CONFIG_FILE": os.devnull,
            "CUDA_VISIBLE_DEVICES": None,
            "CXX": "no-compiler",
            **variables,
        }
        return subprocess.run(
            ["sh", str(self.checkout / "setup_env.sh"), *arguments],
            text=True,
            capture_output=True,
            timeout=300,
            env={name: value for name, value in environment.items() if value is not None},
        )

    def set_up(self, fake_gpu: str, **variables):
        """Set up with the index of stand-ins, whose GPU is this one."""
        return self.sh(PADDLE_INDEX=f"file://{self.index}", FAKE_GPU=fake_gpu, **variables)

    def installed_paddle(self) -> str:
        """The Paddle that the environment's Python finds: real, or the stand-in."""
        python = self.venv / "bin" / "python"
        code = "import importlib.util as u; print(u.find_spec('paddle').origin)"
        found = subprocess.run([python, "-c", code], text=True, capture_output=True, check=True)
        return "stand-in" if str(self.venv) in found.stdout else "real"


WHEEL = "paddlepaddle_gpu-3.3.1-py3-none-any.whl"

# As setup_env.sh asks.
GPU_CHECK = """
import sys
from replknet_paddle.runtime.packages import why_gpus_fail
sys.exit(why_gpus_fail())
"""

# What it asks of Paddle, with numpy behind it.
STAND_IN = """
import os, types
import numpy as np

__version__, _device = "3.3.1", "cpu"
if os.environ["FAKE_GPU"] == "does not start":
    raise ImportError("libcudart.so.12: cannot open shared object file")

class Tensor:
    def __init__(self, value): self.value = value
    def numpy(self): return self.value

def is_compiled_with_cuda(): return True

def set_device(name):
    global _device
    _device = name

def on_device(value):
    if _device != "cpu" and os.environ["FAKE_GPU"] == "raises":
        raise RuntimeError("Traceback\\n(External) CUDA error(209), no kernel image\\n  [Hint: x]")
    wrong = _device != "cpu" and os.environ["FAKE_GPU"] == "wrong"
    return Tensor(value * 1.1 if wrong else value)

def to_tensor(value): return Tensor(value)
def matmul(a, b): return on_device(a.value @ b.value)
def conv2d(x, weight, padding): return on_device(x.value)

cuda = types.SimpleNamespace(
    device_count=lambda: 0 if os.environ["FAKE_GPU"] == "not seen" else 1,
    get_device_name=lambda index: "NVIDIA Fake",
    get_device_capability=lambda index: (8, 6),
)
device = types.SimpleNamespace(cuda=cuda)
version = types.SimpleNamespace(
    cuda=lambda: "12.6",
    cuda_archs=lambda: [90] if os.environ["FAKE_GPU"] == "no code" else [70, 80, 90],
)
"""


def make_stand_in(path: Path) -> None:
    info = f"{WHEEL.split('-py3')[0]}.dist-info"
    files = {
        "paddle/__init__.py": STAND_IN,
        "paddle/nn/__init__.py": "from paddle.nn import functional\n",
        "paddle/nn/functional.py": "from paddle import conv2d\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: paddlepaddle-gpu\nVersion: 3.3.1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def with_a_gpu(machine):
    """One with a GPU and an environment, and an index that is not there yet."""
    machine.has_gpus(RTX_3090)
    machine.has_environment()
    return machine


NO_BUILD = "no build of Paddle has code for all of "


@pytest.mark.parametrize(
    "gpus, build, reason",
    [
        ([GTX_1080], "cu118", ""),
        ([V100], "cu118", ""),
        ([A100], "cu118", ""),
        ([GTX_1080, RTX_3090, RTX_3090], "cu118", ""),
        ([RTX_4090], "cu126", ""),
        ([H100], "cu126", ""),
        ([RTX_3090, RTX_4090], "cu126", ""),  # the one that fits both
        ([B200], "cu129", ""),
        ([RTX_5090], "cu129", ""),
        ([RTX_5090, A100.replace("525", "570")], "cu129", ""),
        ([], None, ""),
        (["3.7, 470.82.01, Tesla K80"], None, f"{NO_BUILD}Tesla K80 (3.7)"),
        ([GTX_1080, H100], None, f"{NO_BUILD}NVIDIA GeForce GTX 1080 (6.1), NVIDIA H100 80GB HBM3 "
         "(9.0); CUDA_VISIBLE_DEVICES hides some"),
        ([H100.replace("535.104.05", "515.65.01")], None,
         "driver 515.65.01 is too old for Paddle on NVIDIA H100 80GB HBM3 (9.0); it needs 525"),
        (["[N/A], 470.82.01, Tesla V100"], None,
         "nvidia-smi does not report compute capabilities"),
    ],
)  # fmt: skip
def test_the_build_is_chosen_by_the_gpus(machine, gpus, build, reason):
    """Where none fits, one line says so, and Paddle for CPU is taken."""
    machine.has_gpus(*gpus)
    done = machine.sh("--paddle")
    paddle = "-r requirements/cpu.txt"
    if build is not None:
        paddle = f"-r requirements/gpu.txt --extra-index-url {INDEX}/{build}/"
    assert (done.returncode, done.stdout) == (0, f"python3 -m pip install {paddle}\n")
    assert reason in done.stderr and len(done.stderr.splitlines()) == bool(reason)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_do_not_count(machine, hidden):
    machine.has_gpus(H100)
    done = machine.sh("--paddle", CUDA_VISIBLE_DEVICES=hidden)
    assert "requirements/cpu.txt" in done.stdout and done.stderr == ""


def test_a_gpu_that_computes_right_is_used(with_a_gpu):
    machine = with_a_gpu
    machine.has_index("cu118")
    done = machine.set_up("right")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(machine.venv / "bin" / "python")
    assert machine.installed_paddle() == "stand-in"
    assert "no GPU is used" not in done.stderr
    assert f"to use it: . {machine.venv}/bin/activate" in done.stderr
    # Nothing is done twice, and hidden GPUs change nothing.
    again = machine.set_up("right")
    hidden = machine.set_up("right", CUDA_VISIBLE_DEVICES="")
    assert "installing" not in again.stderr + hidden.stderr
    found = machine.sh("--find")
    assert (found.returncode, found.stdout) == (0, done.stdout)


# GPUs of the stand-in -> why they are not used.
FAULTS = {
    "right": "",
    "wrong": "Paddle 3.3.1 computes a wrong matrix product on NVIDIA Fake: relative error 1.0",
    "raises": "Paddle 3.3.1 fails on NVIDIA Fake: (External) CUDA error(209), no kernel image",
    "not seen": "Paddle 3.3.1 for CUDA 12.6 sees no GPU",
    "no code": "is built for compute capability 9.0; NVIDIA Fake has 8.6",
}


@pytest.mark.parametrize("gpu, reason", FAULTS.items())
def test_paddle_is_tried_on_the_gpu(tmp_path, gpu, reason):
    make_stand_in(tmp_path / WHEEL)
    done = subprocess.run(
        [sys.executable, "-c", GPU_CHECK],
        text=True,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path / WHEEL), "FAKE_GPU": gpu},
    )
    assert done.returncode == bool(reason), done.stderr
    assert reason in done.stderr and len(done.stderr.splitlines()) == bool(reason)


@pytest.mark.parametrize(
    "gpu, reason",
    [
        pytest.param("wrong", FAULTS["wrong"], marks=pytest.mark.slow),
        pytest.param(
            "does not start", "ImportError: libcudart.so.12: cannot open", marks=pytest.mark.slow
        ),
        (None, "pip could not install -r requirements/gpu.txt --extra-index-url file:"),
    ],
)
def test_where_the_gpu_does_not_work_set_up_goes_on_and_training_does_not(with_a_gpu, gpu, reason):
    """Without a GPU's fault, the index cannot be reached."""
    machine = with_a_gpu
    if gpu is not None:
        machine.has_index("cu118")
    done = machine.set_up(str(gpu))
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("no GPU is used")]
    assert reason in line
    assert machine.installed_paddle() == "real"
    # As the training scripts ask.
    found = machine.sh("--find")
    assert found.returncode == 2 and found.stdout == ""
    assert reason in found.stderr and "type sh setup_env.sh; CUDA_VISIBLE_DEVICES= " in found.stderr
    hidden = machine.sh("--find", CUDA_VISIBLE_DEVICES="")
    assert (hidden.returncode, hidden.stdout) == (0, done.stdout)


@pytest.mark.slow
def test_a_gpu_that_works_at_the_next_set_up_is_used(with_a_gpu):
    machine = with_a_gpu
    assert "no GPU is used" in machine.set_up("right").stderr
    machine.has_index("cu118")
    assert machine.set_up("right").returncode == 0
    assert machine.installed_paddle() == "stand-in"
    assert machine.sh("--find").returncode == 0


@pytest.mark.parametrize(
    "version, cuda, command",
    [
        ("2.5.2", "False", "pip install -r .*/requirements/cpu.txt"),
        ("2.5.2", "11.8", "pip install -r .*/requirements/gpu.txt --extra-index-url https"),
        ("3.1.0", "False", "pip install -r .*/requirements/cpu.txt"),
    ],
)
def test_an_old_paddle_is_refused_with_the_command_that_installs_a_right_one(
    tmp_path, version, cuda, command
):
    """Before it is imported."""
    (tmp_path / "paddle" / "version").mkdir(parents=True)
    (tmp_path / "paddle" / "__init__.py").write_text("raise SystemError('imported')\n")
    (tmp_path / "paddle" / "version" / "__init__.py").write_text(
        f"full_version     = '{version}'\ncuda_version     = '{cuda}'\n"
    )
    wanted = f"Paddle {re.escape(version)} is installed; this needs Paddle 3.1.1 or later: "
    wanted += command
    for status, *arguments in (
        (2, "-m", "replknet_paddle", "predict", "x", "y"),
        (2, ROOT / "main_multi_gpu.py", "-cfg=configs/replknet_nano.yaml"),
        (1, "-c", "from replknet import build_replknet"),
    ):
        done = subprocess.run(
            [sys.executable, *arguments],
            text=True,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
            cwd=ROOT,
        )
        assert done.returncode == status, done.stderr
        assert re.search(wanted, done.stderr.splitlines()[-1])
        assert status == 1 or re.fullmatch(f"error: {wanted}.*\n", done.stderr)


# Ctrl-C at a moment: `replknet predict` in a process that gets SIGINT as it imports a module.
INTERRUPTED = """
import signal, sys
from replknet_paddle.commands import run_command

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
sys.exit(run_command("model-info", ["configs/replknet_nano.yaml"]))
"""


@pytest.mark.parametrize("module", ["yaml", "replknet_paddle.commands.analyze", "paddle"])
def test_ctrl_c_during_imports_ends_a_command_in_a_word(module):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_ctrl_c_waits_for_the_end_of_paddles_import():
    """Its C++ turns one into an ImportError of its own, or crashes."""
    code = INTERRUPTED.replace("SIGINT)", "SIGINT); print('went on')")
    done = subprocess.run(
        [sys.executable, "-c", code, "paddle.base.libpaddle"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (130, "went on\n"), done.stderr
    assert "Traceback" not in done.stderr and done.stderr.endswith("interrupted\n")
