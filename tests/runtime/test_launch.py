"""Starting the processes of a run, with and without GPUs, and what the machines of one tell."""

import os
import signal
import socket
import time

import pytest
from harness import Program, Run, assert_same_end, free_ports, step_of, wait_for
from tiny import ROOT

from replknet_paddle.runtime import launch as launch_module
from replknet_paddle.runtime import machines
from replknet_paddle.runtime.launch import LaunchedRun
from replknet_paddle.runtime.machines import Heartbeat, address_for_others, node_addresses

pytest_plugins = ["harness"]

OWN = address_for_others() or "127.0.1.1"
ELSEWHERE = "203.0.113.7"


# ---- addresses


@pytest.mark.parametrize(
    "host, address, own",
    [
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("127.0.1.1", "127.0.1.1", "127.0.1.1"),
        ("me", OWN, OWN),
        # Other machines cannot reach 127.0.1.1, which Debian's /etc/hosts gives a machine's name.
        ("debian", OWN, OWN),
        ("head", ELSEWHERE, f"to {ELSEWHERE}"),
    ],
)
def test_the_master_is_its_own_host_by_whatever_name(monkeypatch, host, address, own):
    """Another machine gets this one's address on the way to the master."""
    addresses = {"localhost": "127.0.0.1", "me": OWN, "debian": "127.0.1.1", "head": ELSEWHERE}
    monkeypatch.setattr(socket, "gethostbyname", lambda name: addresses.get(name, name))
    if address == ELSEWHERE:
        monkeypatch.setattr(machines, "outgoing_address", lambda destination: f"to {destination}")
    assert node_addresses(f"{host}:80") == (f"{address}:80", own)


# ---- processes of one machine

RANK = """
import os, sys
from replknet_paddle.runtime.processes import init, rank, sum_over_ranks
init()
total = sum_over_ranks([1.0])
open(os.path.join(sys.argv[1], f"rank{rank()}"), "w").write(f"{total[0]} {sys.argv[2]}")
"""


def test_processes_without_a_visible_gpu_run_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    script = tmp_path / "script of a rank.py"
    script.write_text(RANK)
    command = [str(script), str(tmp_path), "an argument with spaces"]
    log_dir = str(tmp_path / "workers")
    assert LaunchedRun(command, processes=2, log_dir=log_dir, on_gpu=False).wait() == (0, "")
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text() == "2.0 an argument with spaces"
    assert "PADDLE_DISTRI_BACKEND" not in os.environ


FAILING = """
import os, sys, time
sys.path.insert(0, {root!r})
from replknet_paddle.runtime.launch import leave_status
if os.environ["PADDLE_TRAINER_ID"] in "{failing}":
    leave_status(2)
    sys.exit(2)
time.sleep(60)
"""


@pytest.mark.parametrize(
    "failing",
    ["01", pytest.param("0", marks=pytest.mark.slow), pytest.param("1", marks=pytest.mark.slow)],
)
def test_the_status_of_a_failing_process_comes_through(tmp_path, failing):
    script = tmp_path / "rank.py"
    script.write_text(FAILING.format(root=str(ROOT), failing=failing))
    run = LaunchedRun([str(script)], processes=2, log_dir=str(tmp_path / "logs"), on_gpu=False)
    assert run.wait()[0] == 2


# ---- signs of life of two machines


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Makes the heartbeats of nodes that take part in one start of a run."""
    monkeypatch.setattr(machines, "LOST_SECONDS", 10.0)
    clock = [0.0]
    monkeypatch.setattr(machines.time, "monotonic", lambda: clock[0])

    def make(name, ports="a:1,b:2"):
        heartbeat = Heartbeat(str(tmp_path / name), nodes=2, master="a:1", address="b")
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setenv("PADDLE_LOG_DIR", str(tmp_path / name))
        monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", ports)
        monkeypatch.setenv("PADDLE_RANK_IN_NODE", "0")
        machines.name_attempt()
        return heartbeat

    return make, clock


def test_a_node_is_lost_by_this_clock_and_not_by_its_own(attempt):
    make, clock = attempt
    one, two = make("one"), make("two")
    for now in (0, 8, 16, 24):
        clock[0] = now
        assert one.beat() is None and two.beat() is None
    for now in (25, 35):  # the last sign that it sees, and 10 s later, no more
        clock[0] = now
        assert one.beat() is None
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
    said = (2, "error: machine two has failed with status 2: error: so it was")
    assert one.beat() == (said if is_failure else None)


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

    monkeypatch.setattr(machines, "write_text", full)
    assert one.beat() is None
    one.end(0, "")


# ---- two machines, as far as one can play both: their addresses differ in name

BEAT_SECONDS = 0.5

# As a rank whose collective waits for another one for ever.
WAITING_RANK = """
import os, time
from replknet_paddle.runtime.launch import end_with_parent
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
    machines.LOST_SECONDS, launch_module.BEAT_SECONDS = 6.0, BEAT_SECONDS
    status, message = LaunchedRun(
        [script], processes=1, log_dir=log_dir, on_gpu=False, nodes=2, master=master
    ).wait()
    print(message)
    return status


@pytest.fixture
def start_nodes(tmp_path):
    """Starts two nodes and waits until their processes have met; ends what is left of them."""
    started = []

    def start(master):
        script = tmp_path / "rank.py"
        script.write_text(WAITING_RANK)
        folders = [tmp_path / "workers" / name for name in ("one", "two")]
        for folder in folders:
            said = tmp_path / f"{folder.name}.txt"
            started.append(Run([script, folder, master], output=said, target=node))
        wait_for(lambda: all((f / "ready").exists() for f in folders), timeout=120, every=0.1)
        shared = tmp_path / "workers" / machines.NODES_FOLDER
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


@pytest.mark.slow
def test_a_run_whose_node_is_killed_is_restarted_and_ends_the_same(
    run_flags, straight_on_two, tmp_path
):
    """The script on both nodes; that of the killed one is started again, as a scheduler would."""
    run, master = tmp_path / "run", f"localhost:{free_ports(1)[0]}"

    def start(*more):
        flags = [*run_flags, "-batch_size=4", f"-output={run}", *more]
        return Program(flags, restarts=2, NNODES="2", NPROC_PER_NODE="1", MASTER=master)

    started = [start(), start()]
    try:
        wait_for(lambda: step_of(run) >= 4, timeout=200)
        started[1].end()
        wait_for(lambda: "restart 1 of 2" in (run / "log.txt").read_text(), timeout=60, every=0.1)
        started.append(start("-resume=auto"))
        for program in (started[0], started[2]):
            status, said = program.finish(240)
            assert status == 0, said
    finally:
        for program in started:
            program.end()
    assert_same_end(run, straight_on_two)


def test_a_process_that_is_still_ending_is_none_of_another_machine(monkeypatch):
    """It has closed its connections, which the others notice, before it counts as ended."""
    answers, handled = iter([True, True, False]), []
    monkeypatch.setenv("PADDLE_LOG_DIR", "logs")
    monkeypatch.setattr(launch_module, "_all_are_running", lambda: next(answers))
    monkeypatch.setattr(launch_module, "LAUNCHER_SECONDS", 0)
    monkeypatch.setattr(signal, "signal", lambda number, _: handled.append(number))
    launch_module.wait_to_be_ended()
    assert handled == [signal.SIGTERM]  # the launcher's, at which this process is silent
