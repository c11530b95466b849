"""Two machines of one run, as far as one machine can play both: their addresses differ in name."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from harness import Run, assert_same_end, free_ports, step_of, wait_for
from tiny import ROOT

from replknet_paddle.runtime import launch as launch_module
from replknet_paddle.runtime import nodes
from replknet_paddle.runtime.nodes import Heartbeat

pytest_plugins = ["harness"]

BEAT_SECONDS = 0.5

# As a rank whose collective waits for another one for ever.
RANK = """
import os, time
from replknet_paddle.runtime.parent import end_with_parent
from replknet_paddle.runtime.processes import init, sum_over_ranks

end_with_parent()
init()
assert sum_over_ranks([1.0])[0] == 2
folder = os.environ["PADDLE_LOG_DIR"]
open(os.path.join(folder, "ready"), "w").close()
while True:
    time.sleep(0.1)
    if os.path.exists(os.path.join(folder, "fail")):
        os._exit(7)
"""


def node(arguments: list[str]) -> int:
    """One of two nodes, as the program of a run is."""
    script, log_dir, master = arguments
    nodes.LOST_SECONDS, launch_module.BEAT_SECONDS = 6.0, BEAT_SECONDS
    status, message = launch_module.launch(
        [script], processes=1, log_dir=log_dir, nodes=2, master=master
    )
    print(message)
    return status


@pytest.fixture
def start_nodes(tmp_path):
    """Starts two nodes and waits until their processes have met; ends what is left of them."""
    started = []

    def start(master):
        script = tmp_path / "rank.py"
        script.write_text(RANK)
        folders = [tmp_path / "workers" / name for name in ("one", "two")]
        for folder in folders:
            said = tmp_path / f"{folder.name}.txt"
            started.append(Run([script, folder, master], output=said, target=node))
        wait_for(lambda: all((f / "ready").exists() for f in folders), timeout=120, every=0.1)
        shared = tmp_path / "workers" / nodes.FOLDER
        wait_for(lambda: len(list(shared.glob("*/*"))) == 2, timeout=60, every=0.1)
        return list(zip(started, folders))

    yield start
    for run in started:
        run.send(signal.SIGKILL)
        run.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["localhost", "127.0.1.1", socket.gethostname()])
def test_where_a_node_is_killed_the_other_one_ends(start_nodes, name):
    (one, _), (two, _) = start_nodes(f"{name}:{free_ports(1)[0]}")
    time.sleep(2 * BEAT_SECONDS)
    assert one.process.is_alive() and two.process.is_alive()
    two.send(signal.SIGKILL)  # and the kernel kills all that it has started
    assert one.wait(60) == 128 + signal.SIGKILL, one.text()  # which MAX_RESTARTS restarts
    assert "machine two has given no sign for 6 s" in one.text()


@pytest.mark.slow
def test_where_a_process_fails_both_nodes_end_at_once(start_nodes):
    (one, _), (two, folder) = start_nodes(f"localhost:{free_ports(1)[0]}")
    (folder / "fail").touch()
    assert one.wait(60) == two.wait(60) != 0, one.text()
    assert "machine two has failed with status" in one.text()


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Makes the heartbeats of nodes that take part in one start of a run."""
    monkeypatch.setattr(nodes, "LOST_SECONDS", 10.0)
    clock = [0.0]
    monkeypatch.setattr(nodes.time, "monotonic", lambda: clock[0])

    def make(name, ports="a:1,b:2"):
        heartbeat = Heartbeat(str(tmp_path / name), nodes=2, master="a:1", address="b")
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setenv("PADDLE_LOG_DIR", str(tmp_path / name))
        monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", ports)
        monkeypatch.setenv("PADDLE_RANK_IN_NODE", "0")
        nodes.name_attempt()
        return heartbeat

    return make, clock


def test_a_node_is_lost_by_this_clock_and_not_by_its_own(attempt):
    make, clock = attempt
    one, two = make("one"), make("two")
    for now in (0, 8, 16, 24):
        clock[0] = now
        assert one.beat() is None and two.beat() is None
    clock[0] = 25
    assert one.beat() is None  # the last sign that it sees
    clock[0] = 35
    assert one.beat() is None  # 10 s, no more
    clock[0] = 36
    status, message = one.beat()
    assert status == 137 and "machine two has given no sign for 10 s" in message


@pytest.mark.parametrize("status, is_failure", [(0, False), (143, False), (130, False), (2, True)])
def test_a_node_that_ended_is_not_lost_but_may_have_failed(attempt, status, is_failure):
    make, clock = attempt
    one, two = make("one"), make("two")
    assert one.beat() is None and two.beat() is None and one.beat() is None
    two.end(status, "error: so it was")
    clock[0] = 1000
    failure = one.beat()
    assert (failure is not None) == is_failure
    if is_failure:
        assert failure == (2, "error: machine two has failed with status 2: error: so it was")


def test_nodes_of_an_earlier_start_do_not_count(attempt):
    make, clock = attempt
    make("two").end(1, "failed an hour ago")
    one, two = make("one", "a:3,b:4"), make("two", "a:3,b:4")
    for now in (0, 9, 18):
        clock[0] = now
        assert one.beat() is None and two.beat() is None


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(attempt, monkeypatch):
    make, _ = attempt
    one = make("one")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nodes, "_replace", full)
    assert one.beat() is None
    one.end(0, "")


@pytest.mark.slow
def test_a_run_whose_node_is_killed_is_restarted_and_ends_the_same(
    run_flags, straight_on_two, tmp_path
):
    """The script on both nodes; that of the killed one is started again, as a scheduler would."""
    run, master = tmp_path / "run", f"localhost:{free_ports(1)[0]}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    environment |= {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER": master, "MAX_RESTARTS": "2"}

    def start(name, *more):
        with open(tmp_path / name, "w") as output:
            return subprocess.Popen(
                ["sh", "run_train_multi.sh", *run_flags, "-batch_size=4", f"-output={run}", *more],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    started = [start("one"), start("two")]
    try:
        wait_for(lambda: step_of(run) >= 4, timeout=200, every=0.05)
        os.killpg(started[1].pid, signal.SIGKILL)
        started[1].wait()
        killed_at = time.monotonic()
        wait_for(lambda: "restart 1 of 2" in (tmp_path / "one").read_text(), timeout=60, every=0.1)
        assert time.monotonic() - killed_at < 60
        started.append(start("two again", "-resume=auto"))
        for process in (started[0], started[2]):
            assert process.wait(timeout=240) == 0, (tmp_path / "one").read_text()
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert_same_end(run, straight_on_two)
