"""Runs of the training command as tests want them: forked, launched, on small disks, with faults.

Importing Paddle takes about two seconds. Here one process per test session has imported everything
and run nothing, and each `Run` is a fork of it, with its own arguments, environment and output. A
fork can be signalled and killed like any other process, and so can its loader workers.
"""

import contextlib
import fcntl
import functools
import json
import multiprocessing
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import faulty_storage
import numpy as np
import paddle
import pytest
import yaml
from PIL import Image
from tiny import PICTURES, ROOT, TINY

from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.checkpoints.run_folder import checkpoints, load_checkpoint
from replknet_paddle.config import get_config
from replknet_paddle.data.transforms import build_eval_transform
from replknet_paddle.deploy.gradcam import grad_cam, last_features
from replknet_paddle.model import build_replknet

CONTEXT = multiprocessing.get_context("forkserver")


@functools.cache
def start_server() -> None:
    """Import everything once, in a process that every run is forked from."""
    CONTEXT.set_forkserver_preload(["replknet_paddle.engine.run", "replknet_paddle.commands.train"])
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


class Run:
    """One run under way.

    Args:
        arguments: of the command line.
        output: file for what it prints.
        target: what to call instead of the command `train`: (arguments) -> exit status.
        environment: variables beside those of this process.
        fault: what happens in it, as arguments of `install`.
    """

    def __init__(self, arguments, *, output: Path, target=None, environment=None, fault=None):
        start_server()
        self.output = output
        self.process = CONTEXT.Process(
            target=_child,
            args=([str(a) for a in arguments], str(output), target, environment or {}, fault),
        )
        self.process.start()
        self.pid = self.process.pid

    def send(self, number: int) -> None:
        """Signal the process, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait_for_step(self, run_folder, step: int) -> None:
        """Wait until the run has done an optimizer step, or has ended."""
        wait_for(lambda: step_of(run_folder) >= step or not self.process.is_alive(), timeout=300)

    def wait(self, timeout: float = 300) -> int:
        """The exit status, or minus the signal that ended it."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {timeout} s:\n{self.text()}")
        return self.process.exitcode

    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text() if self.output.exists() else ""


def _child(arguments, output, target, environment, fault):
    sys.stdout.flush()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    os.chdir(ROOT)
    # Of loader workers, as in a process of its own.
    multiprocessing.set_start_method("fork", force=True)
    if fault is not None:
        install(*fault)
    sys.exit((target or main_status)(arguments))


def main_status(arguments: list[str]) -> int:
    """`main_multi_gpu.py` with these arguments, in this process."""
    from replknet_paddle.commands import run_command

    return run_command("train", arguments)


def finish(arguments, *, output: Path | None = None, status: int = 0, **options) -> str:
    """Run to the end; returns what was printed, once the status is right."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(arguments, output=output or Path(folder, "said"), **options)
        return text_at_end(run, status)


def text_at_end(run: Run, status: int) -> str:
    """What a run has printed, once it has ended with this status."""
    got = run.wait()
    assert got == status, f"status {got}, expected {status}:\n{run.text()}"
    return run.text()


def finish_ranks(arguments, *, folder: Path | None = None, ranks=2, status=0, target=None):
    """The same run in several processes over gloo, as Paddle's launcher would start them."""
    ports = free_ports(ranks + 1)
    endpoints = [f"127.0.0.1:{port}" for port in ports[1:]]
    common = {
        "PADDLE_TRAINERS_NUM": str(ranks),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_MASTER": f"127.0.0.1:{ports[0]}",
        "PADDLE_DISTRI_BACKEND": "gloo",
    }
    with tempfile.TemporaryDirectory() as temporary:
        runs = []
        for rank, endpoint in enumerate(endpoints):
            output = Path(folder or temporary, f"rank{rank}.txt")
            own = {"PADDLE_TRAINER_ID": str(rank), "PADDLE_CURRENT_ENDPOINT": endpoint}
            runs.append(Run(arguments, output=output, target=target, environment=common | own))
        return [text_at_end(run, status) for run in runs]


class Program(subprocess.Popen):
    """A program in a process group of its own, as a shell starts it; main_multi_gpu.py by default.

    With `restarts`, it is run_train_multi.sh.
    """

    def __init__(self, arguments, *, restarts: int | None = None, **environment):
        command = [sys.executable, str(ROOT / "main_multi_gpu.py")]
        if restarts is not None:
            command = ["sh", str(ROOT / "run_train_multi.sh")]
            environment = {"MAX_RESTARTS": str(restarts), "PYTHON": sys.executable, **environment}
        super().__init__(
            [*command, *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def finish(self, timeout=300) -> tuple[int, str]:
        """Wait for the end: exit status, and what was printed."""
        try:
            said, _ = self.communicate(timeout=timeout)
        finally:
            self.end()
        return self.returncode, said

    def wait_for_step(self, run_folder, step: int) -> None:
        """Wait until the run has done an optimizer step, or has ended."""
        wait_for(lambda: step_of(run_folder) >= step or self.poll() is not None, timeout=300)

    def end(self) -> None:
        """End the whole group, if the program has not ended."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


def run_typed(line: str, timeout: float = 180) -> subprocess.CompletedProcess:
    """Run a `replknet` command line as a shell in the checkout does."""
    words = shlex.split(line)
    words[: words.index("train") if "train" in words else words.index("eval")] = []
    return subprocess.run(
        [sys.executable, "-m", "replknet_paddle", *words],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
    )


# ---- terminals


def on_terminal(command, columns: int) -> tuple[int, str]:
    """Run a program with a terminal for its output: exit status, and all that it has written."""
    try:
        terminal, program_end = pty.openpty()
    except OSError as error:  # a bare root file system without devpts
        pytest.skip(f"no terminal can be made here: {error}")
    fcntl.ioctl(program_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    program = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        stdout=program_end,
        stderr=program_end,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    os.close(program_end)
    raw = b""
    with contextlib.suppress(OSError):  # EIO: nobody has it open any more
        while piece := os.read(terminal, 65536):
            raw += piece
    os.close(terminal)
    return program.wait(), raw.decode("utf-8", "replace")


def screen(raw: str) -> list[str]:
    """The lines that a terminal shows after carriage returns and cursor movements, but for empty
    ones."""
    lines, row, column = [[]], 0, 0
    for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|[^\x1b]", raw):
        if part == "\x1b[A":
            row = max(0, row - 1)
        elif part == "\x1b[K":
            del lines[row][column:]
        elif part.startswith("\x1b["):
            assert part.endswith("m"), f"unknown control sequence {part!r}"
        elif part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            if row == len(lines):
                lines.append([])
        else:
            line = lines[row]
            line.extend(" " * (column + 1 - len(line)))
            line[column] = part
            column += 1
    texts = ["".join(line).rstrip() for line in lines]
    return [text for text in texts if text]


# ---- faults


def install(at: str, do: str, rank: int | None = None) -> None:
    """Let this process of a run do something at one point.

    Args:
        at: 'step 4': after it; 'metrics 2': once epoch 2 is in metrics.jsonl; 'evaluation 4': after
            the fourth; 'validation 4': before that of epoch 4; 'training 0': before the first step;
            'reading 0': instead of the first batch; 'opening a.jpg': whenever such a file is.
        do: 'SIGKILL', or another signal to itself; 'wait /a/path' until that exists; 'be signalled'
            or wait until then; 'full disk': files end at 100 kB; 'killed in a write': who writes
            more, dies; Python for something else, such as an exception to raise; of an opening,
            'EIO' and what else `faulty_storage.break_storage` knows.
        rank: of the one process that does so; None: all.
    """
    from replknet_paddle.data.loader import Loader
    from replknet_paddle.engine import run
    from replknet_paddle.engine.run_log import RunLog

    if rank not in (None, int(os.environ.get("PADDLE_TRAINER_ID", 0))):
        return
    event, number = at.split(maxsplit=1)
    if event == "opening":
        return faulty_storage.break_storage(number, do)
    calls = []
    owner, name, number_of, is_after = {
        "step": (RunLog, "write_step", lambda self, step: step, True),
        "metrics": (RunLog, "write_metrics", lambda self, record: record["epoch"], True),
        "evaluation": (run, "evaluate", lambda **_: len(calls), True),
        "validation": (run.Training, "validate", lambda self, _: self.progress.epoch, False),
        "training": (run.Training, "train_epochs", lambda *_: 0, False),
        "reading": (Loader, "__iter__", lambda _: 0, False),
    }[event]
    really = getattr(owner, name)

    def faulty(*args, **kwargs):
        calls.append(1)
        is_now = number_of(*args, **kwargs) == int(number)
        if is_now and not is_after:
            act(do)
        result = really(*args, **kwargs)
        if is_now and is_after:
            act(do)
        return result

    setattr(owner, name, faulty)


def act(do: str) -> None:
    """Do what `install` was asked for."""
    if do.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[do])
    elif do == "be signalled":
        signals = signal.getsignal(signal.SIGTERM).__self__  # engine.signals.StopSignals
        wait_for(lambda: signals.received, timeout=300)
    elif do.startswith("wait "):
        wait_for(lambda: os.path.exists(do.removeprefix("wait ")), timeout=300)
    elif do in ("full disk", "killed in a write"):
        is_full = do == "full disk"
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN if is_full else signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    else:
        from replknet_paddle.runtime import errors

        result = eval(do, vars(errors))
        if isinstance(result, Exception):
            raise result


# The sitecustomize of a folder on PYTHONPATH, which Python imports before it runs a program.
CUSTOMIZED = """
import os, sys
if sys.orig_argv[1:5] == ["-u", "-m", "replknet_paddle", "train"]:
    sys.path.append({tests!r})
{code}
"""

# Notes how often a process of a run is started, and lets each start have one of `faults`.
FAILING = """
    name = {starts!r}
    if "PADDLE_TRAINER_ID" in os.environ:
        name += "." + os.environ["PADDLE_TRAINER_ID"]
    with open(name, "a") as file:
        file.write(" ".join(sys.argv[1:]) + chr(10))
    for fault in {faults!r}[len(open(name).readlines()) - 1 :][:1]:
        import harness
        harness.install(*fault)
"""


def customized(folder: Path, code: str) -> dict[str, str]:
    """Variables with which each process that a run starts, by Paddle's launcher or as one that may
    be restarted, executes `code`, indented by four, which is written to `folder`."""
    (folder / "custom").mkdir(exist_ok=True)
    text = CUSTOMIZED.format(code=code, tests=str(ROOT / "tests"))
    (folder / "custom" / "sitecustomize.py").write_text(text)
    return {
        "PYTHONPATH": os.pathsep.join([str(folder / "custom"), str(ROOT)]),
        # Of Paddle, which `code` may import before the program does.
        "PYTHONWARNINGS": "ignore:No ccache found",
    }


def failing(folder: Path, *faults) -> dict[str, str]:
    """Variables with which what a program starts has one of these faults, as arguments of
    `install`, at each start, and then none; `folder`/starts gets the arguments of each start."""
    return customized(folder, FAILING.format(starts=str(folder / "starts"), faults=faults))


# ---- small and read-only disks

FILLING = "filling"  # the file that takes the room


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of 1 MiB in memory, mounted with these options, which only root can do."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size=1m,{options}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def small_disk(folder: Path, *, free_bytes: int = 0) -> Iterator[Path]:
    """One with so much room left."""
    with mounted(folder, "rw"):
        filling = folder / FILLING
        with open(filling, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        os.truncate(filling, filling.stat().st_size - free_bytes)
        yield folder


# ---- processes


def children(pid: int) -> list[int]:
    """Processes that `pid` started and that are still there."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found


def descendants(pid: int) -> list[int]:
    """All processes that `pid` started, and that those started, and so on."""
    found = children(pid)
    for child in list(found):
        found += descendants(child)
    return found


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


def wait_for(condition, *, timeout: float = 60, every: float = 0.002):
    """Poll until `condition()` is true; returns its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)
    return value


# ---- what is asked of run folders

TIMES = ("train_seconds", "train_images_per_second", "val_seconds")


def metrics(run_folder) -> list[dict]:
    """The lines of metrics.jsonl but for times, each of them JSON as the standard has it."""

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    with open(run_folder / "metrics.jsonl") as file:
        records = [json.loads(line, parse_constant=refuse) for line in file]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def assert_same_end(got, wanted, *, records=True) -> None:
    """Weights, average, optimizer state, progress and metrics of two runs, bit for bit."""
    left, right = (load_checkpoint(str(folder / "last")) for folder in (got, wanted))
    assert left.progress == right.progress
    assert left.scaler == right.scaler
    for part in ("model", "model_ema", "optimizer"):
        ours, theirs = getattr(left, part), getattr(right, part)
        assert ours.keys() == theirs.keys() and ours
        wrong = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
        assert not wrong, f"{part}: {len(wrong)} of {len(ours)} differ, e.g. {wrong[:3]}"
    if records:
        assert metrics(got) == metrics(wanted)


def step_of(run_folder) -> int:
    """The last optimizer step that a run says it has done."""
    try:
        return int((run_folder / "step").read_text() or 0)
    except (FileNotFoundError, ValueError):
        return 0


def whole_steps(run_folder) -> list[int]:
    """The steps of the checkpoints of a run."""
    return [int(re.search(r"step_(\d+)", path)[1]) for path in checkpoints(str(run_folder))]


def unfinished(run_folder) -> set[str]:
    """Checkpoints that some process has begun to write."""
    where = run_folder / "checkpoints"
    names = os.listdir(where) if where.exists() else []
    return {name for name in names if name.endswith(".unfinished")}


def progress_of(run_folder):
    """The progress of RUN/last, which is the newest checkpoint; None where there is none yet."""
    last = run_folder / "last"
    if not os.path.lexists(last):
        assert not checkpoints(str(run_folder))
        return None
    assert os.path.realpath(last) == os.path.realpath(checkpoints(str(run_folder))[-1])
    return load_checkpoint(str(last)).progress


def copy_run(run_folder, to):
    """A copy of a run folder; returns its path."""
    shutil.copytree(run_folder, to, symlinks=True)
    return to


# ---- runs that nothing happened to, one of each per session, for others to be compared with


@pytest.fixture
def run_flags(tiny_config_file, tiny_data):
    """Flags of a tiny run, 4 epochs of 3 steps in one process, but for its folder."""
    return [f"-cfg={tiny_config_file}", f"-data_path={tiny_data}"]


@pytest.fixture(scope="session")
def straight(tiny_config_file, tiny_data, tmp_path_factory):
    """The folder of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    finish([f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", f"-output={folder / 'run'}"])
    return folder / "run"


@pytest.fixture(scope="session")
def straight_on_two(tiny_config_file, tiny_data, tmp_path_factory):
    """The same in two processes with half the batch each, dropping out alike."""
    folder = tmp_path_factory.mktemp("straight_on_two")
    flags = [f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", "-batch_size=4"]
    finish_ranks([*flags, f"-output={folder / 'run'}"])
    return folder / "run"


# ---- run folders made without training


def make_run(folder, *, image_size=32, classes=4):
    """Write below `folder` config.yaml and best, of a network whose outputs depend on its input;
    returns it."""
    settings = yaml.safe_load(TINY)
    settings["DATA"] |= {"IMAGE_SIZE": image_size, "CROP_PCT": 0.9}
    settings["MODEL"] |= {"NUM_CLASSES": classes}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    write_safetensors(
        folder / "best",
        {name: value.numpy() for name, value in calibrated(folder).state_dict().items()},
        metadata={},
    )
    return folder


def heat_map(network, image, label):
    """The map (H / 32, W / 32) of one image (1, 3, H, W) and one class."""
    with last_features(network) as features:
        network(paddle.to_tensor(image))
    (heat,) = grad_cam(network, features[0], np.array([label]))
    return heat


def calibrated(folder):
    """A network whose running statistics fit photographs, so that it tells them apart."""
    paddle.seed(0)
    network = build_replknet(get_config(folder / "config.yaml"))
    rng = np.random.default_rng(0)
    network.train()
    transform = build_eval_transform(network.config)
    images = np.stack([transform(Image.open(path)) for path in PICTURES])
    for layer in network.sublayers():
        if hasattr(layer, "_momentum"):
            layer._momentum = 0.0  # the statistics of these pictures, in one pass
    network(paddle.to_tensor(images))
    network.head.weight.set_value(rng.normal(0, 1, network.head.weight.shape).astype("float32"))
    network.eval()
    return network
