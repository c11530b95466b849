"""Where a node says it is, and processes without a visible GPU."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
from tiny import ROOT

from replknet_paddle.runtime import launch as module
from replknet_paddle.runtime import machines
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.launch import LaunchedRun
from replknet_paddle.runtime.machines import address_for_others, node_addresses

OWN = address_for_others() or "127.0.1.1"


def test_the_master_is_its_own_host_by_whatever_name(monkeypatch):
    addresses = {"localhost": "127.0.0.1", "me": OWN, "debian": "127.0.1.1"}
    monkeypatch.setattr(socket, "gethostbyname", lambda name: addresses.get(name, name))
    assert node_addresses("localhost:80") == ("127.0.0.1:80", "127.0.0.1")
    assert node_addresses("127.0.0.1:80") == ("127.0.0.1:80", "127.0.0.1")
    assert node_addresses("127.0.1.1:80") == ("127.0.1.1:80", "127.0.1.1")
    assert node_addresses("me:80") == (f"{OWN}:80", OWN)
    # Other machines cannot reach 127.0.1.1, which Debian's /etc/hosts gives a machine's name.
    assert node_addresses("debian:80") == (f"{OWN}:80", OWN)


def test_another_machine_is_reported_the_address_on_the_way_to_the_master(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "203.0.113.7")
    monkeypatch.setattr(machines, "outgoing_address", lambda destination: f"to {destination}")
    assert node_addresses("head:80") == ("203.0.113.7:80", "to 203.0.113.7")


def test_a_master_that_does_not_resolve_is_one_message(tmp_path):
    with pytest.raises(InputError, match="MASTER is no.such.host.invalid:80.*does not resolve"):
        LaunchedRun(
            ["x.py"],
            processes=1,
            log_dir=str(tmp_path),
            on_gpu=False,
            nodes=2,
            master="no.such.host.invalid:80",
        )


# Stands for Python, which would run Paddle's launcher.
LAUNCHER = """#!/bin/sh
printf "%s %s" "$CUDA_VISIBLE_DEVICES" "$PADDLE_DISTRI_BACKEND" > "{seen}"
"""


@pytest.mark.parametrize("visible", ["", "-1", None])
def test_the_launcher_gets_a_hidden_device_for_each_process(tmp_path, monkeypatch, visible):
    hide(monkeypatch, visible)
    python, seen = tmp_path / "python", tmp_path / "seen"
    python.write_text(LAUNCHER.format(seen=seen))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    run = LaunchedRun(["x.py"], processes=2, log_dir=str(tmp_path / "workers"), on_gpu=False)
    assert run.wait() == (0, "")
    assert seen.read_text() == "-1,-1 gloo"


def hide(monkeypatch, visible) -> None:
    """Let no GPU be visible, where CUDA_VISIBLE_DEVICES is `visible`."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


# Stands for Python and a launcher whose processes have met those of the other node, and now wait
# for ever.
WAITING_LAUNCHER = """#!/bin/sh
echo "$@" > "{folder}/arguments"
mkdir -p "{folder}/workers/one"
printf first-start > "{folder}/workers/one/{attempt}"
exec tail -f /dev/null
"""


def test_a_launcher_is_ended_once_another_node_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.05)
    python, workers = tmp_path / "python", tmp_path / "workers"
    python.write_text(WAITING_LAUNCHER.format(folder=tmp_path, attempt=machines.ATTEMPT_FILE))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    (workers / machines.NODES_FOLDER / "first-start").mkdir(parents=True)
    (workers / machines.NODES_FOLDER / "first-start" / "two").write_text("5\n7\nerror: so it was")
    log_dir = str(workers / "one")
    status, message = LaunchedRun(
        ["x.py"], processes=1, log_dir=log_dir, on_gpu=False, nodes=2, master="localhost:80"
    ).wait()
    assert (status, message) == (
        7,
        "error: machine two has failed with status 7: error: so it was",
    )
    arguments = (tmp_path / "arguments").read_text()
    assert "--nnodes 2 --master 127.0.0.1:80 --host 127.0.0.1 x.py" in arguments
    assert (workers / machines.NODES_FOLDER / "first-start" / "one").exists()


RANK = """
import os, sys
from replknet_paddle.runtime.processes import init, rank, sum_over_ranks
init()
total = sum_over_ranks([1.0])
open(os.path.join(sys.argv[1], f"rank{rank()}"), "w").write(f"{total[0]} {sys.argv[2]}")
"""


@pytest.mark.parametrize("visible", [""])
def test_processes_without_a_visible_gpu_run_on_the_cpu(tmp_path, monkeypatch, visible):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    hide(monkeypatch, visible)
    script = tmp_path / "script of a rank.py"
    script.write_text(RANK)
    status, _ = LaunchedRun(
        [str(script), str(tmp_path), "an argument with spaces"],
        processes=2,
        log_dir=str(tmp_path / "workers"),
        on_gpu=False,
    ).wait()
    assert status == 0
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text() == "2.0 an argument with spaces"
    assert "PADDLE_DISTRI_BACKEND" not in os.environ


@pytest.mark.slow
def test_the_name_of_the_machine_need_not_resolve(tiny_config_file, tiny_data, tmp_path):
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname no-such-name && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*renamed, "true"]).returncode:
        pytest.skip("only root can give this process a machine's name of its own")
    flags = [f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", f"-output={tmp_path / 'run'}"]
    flags += ["-nproc=2", "-batch_size=4", "-opts", "TRAIN.NUM_EPOCHS", "1"]
    done = subprocess.run(
        [*renamed, sys.executable, "main_multi_gpu.py", *flags],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
