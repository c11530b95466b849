"""Two machines of one run in network namespaces: own addresses, host names, a link that is cut.

Needs root on Linux and the program `ip`, and leaves nothing behind.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import assert_same_end, customized, step_of, wait_for
from tiny import ROOT

pytest_plugins = ["harness"]
pytestmark = pytest.mark.slow

ADDRESSES = {"a": "10.77.31.1", "b": "10.77.31.2"}
PORT = 8090

# Reminders come early, and training processes do not wait for Paddle's launcher to end them.
PATIENT = """
    from replknet_paddle.runtime import launch, machines
    launch.LAUNCHER_SECONDS = 3600
    machines.FIRST_REMINDER_SECONDS, machines.REMINDER_SECONDS = 4, 4
"""


def ip(*arguments) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Machines:
    """Two network namespaces with a link between them, and the runs in them.

    Each machine's own name means 127.0.1.1 there, as Debian has it, and it knows the other's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = customized(folder, PATIENT)
        self.names = {node: f"replknet{os.getpid()}{node}" for node in ADDRESSES}
        self.runs: dict[str, subprocess.Popen] = {}

    def set_up(self) -> None:
        for node, name in self.names.items():
            ip("netns", "add", name)
            self.hosts(node).parent.mkdir(parents=True)
            others = [f"{ADDRESSES[other]} node-{other}\n" for other in ADDRESSES if other != node]
            own = ["127.0.0.1 localhost\n", f"127.0.1.1 node-{node}\n"]
            self.hosts(node).write_text("".join(own + others))
        a, b = self.names.values()
        ip("-n", a, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", b)
        for node, name in self.names.items():
            ip("-n", name, "addr", "add", f"{ADDRESSES[node]}/24", "dev", "wire")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "wire", "up")

    def hosts(self, node: str) -> Path:
        return Path("/etc/netns") / self.names[node] / "hosts"

    def forget_own_name(self, node: str) -> None:
        """Let the machine's own name mean nothing there."""
        hosts = self.hosts(node)
        hosts.write_text(re.sub(r"127\.0\.1\.1.*\n", "", hosts.read_text()))

    def tear_down(self) -> None:
        for run in self.runs.values():
            if run.poll() is None:
                run.kill()
            run.wait()
        for name in self.names.values():
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir("/etc/netns")

    def cut(self, is_cut: bool = True) -> None:
        """Cut or mend the link, at the end of machine b; a cut takes the routes away."""
        ip("-n", self.names["b"], "link", "set", "wire", "down" if is_cut else "up")

    def command(self, node: str, *command: str) -> list[str]:
        """A command on one of the machines, under a host name of its own."""
        return [
            *("ip", "netns", "exec", self.names[node], "unshare", "--uts", "sh", "-c"),
            *(f'hostname node-{node} && exec "$@"', "sh", *command),
        ]

    def start(self, node: str, flags, *, master=f"{ADDRESSES['a']}:{PORT}", count=2, **environment):
        """Start a machine's part of a run; its output is in the file of the machine's name."""
        variables = {
            "NNODES": str(count), "NPROC_PER_NODE": "1", "MASTER": master, "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", **self.environment, **environment,
        }  # fmt: skip
        program = (sys.executable, "-u", "-m", "replknet_paddle", "train")
        with open(self.folder / node, "w") as output:
            self.runs[node] = subprocess.Popen(
                self.command(node, *program, *map(str, flags)),
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def start_both(self, flags, **options) -> None:
        for node in ADDRESSES:
            self.start(node, flags, **options)

    def said(self, node: str) -> str:
        return (self.folder / node).read_text()

    def ended(self, node: str, timeout: float = 120) -> int:
        """The status of a machine's part."""
        return self.runs[node].wait(timeout)

    def finish_both(self) -> None:
        for node in ADDRESSES:
            assert self.ended(node, 240) == 0, self.said(node)


@pytest.fixture
def machines(tmp_path):
    if os.geteuid() != 0 or sys.platform != "linux" or not shutil.which("ip"):
        pytest.skip("only root on Linux, with `ip`, can make network namespaces")
    made = Machines(tmp_path)
    try:
        made.set_up()
    except (subprocess.CalledProcessError, OSError) as error:
        made.tear_down()
        pytest.skip(f"no network namespaces can be made here: {error}")
    yield made
    made.tear_down()


@pytest.fixture
def flags(run_flags, tmp_path):
    """Of the run `straight_on_two`."""
    return [*run_flags, "-batch_size=4", f"-output={tmp_path / 'run'}"]


@pytest.mark.parametrize(
    "own_name, master",
    [("127.0.1.1", ADDRESSES["a"]), ("127.0.1.1", "node-a"), ("nothing", ADDRESSES["a"])],
)
def test_what_a_machines_own_name_means_is_no_obstacle(
    machines, flags, straight_on_two, tmp_path, own_name, master
):
    """127.0.1.1, as on Debian, or nothing; the others know it by an address."""
    if own_name == "nothing":
        for node in ADDRESSES:
            machines.forget_own_name(node)
    machines.start_both(flags, master=f"{master}:{PORT}")
    machines.finish_both()
    for node in ADDRESSES:
        assert "httpx" not in machines.said(node) and "HTTP Request" not in machines.said(node)
    assert_same_end(tmp_path / "run", straight_on_two)


@pytest.fixture
def long(flags):
    """Of a run that is long enough to meet what happens to it."""
    return [*flags, "-opts", "TRAIN.NUM_EPOCHS", "40"]


@pytest.fixture
def under_way(machines, long, tmp_path):
    """The machines, once that run has made four steps."""
    machines.start_both(long)
    wait_for(lambda: step_of(tmp_path / "run") >= 4, timeout=120)
    return machines


def test_a_link_cut_for_ten_seconds_changes_no_bit(under_way, long, tmp_path):
    under_way.cut()
    time.sleep(10)
    at = step_of(tmp_path / "run")
    under_way.cut(False)
    wait_for(lambda: step_of(tmp_path / "run") > at, timeout=60)
    under_way.finish_both()
    straight = tmp_path / "straight"
    under_way.start_both([f"-output={straight}" if "-output" in flag else flag for flag in long])
    under_way.finish_both()
    assert_same_end(tmp_path / "run", straight)


def test_a_link_cut_for_good_ends_both_with_what_gloo_says(under_way, tmp_path):
    under_way.cut()
    for node in ADDRESSES:  # after gloo's 30 seconds, and without PATIENT's hour
        assert under_way.ended(node) == 1, under_way.said(node)
        said = under_way.said(node)
        assert len(re.findall("^error: ", said, re.M)) == 1 and "Traceback" not in said, said
        assert "give signs of life" not in said, said
    texts = [under_way.said(node) for node in ADDRESSES]
    lost = "the connection to another process of this run is lost: "
    assert any(lost in text and "(gloo: TIMEOUT" in text for text in texts)
    assert "the run ended: " in (tmp_path / "run" / "log.txt").read_text()


def test_a_killed_machine_is_noticed_by_the_other_at_once(under_way, tmp_path):
    under_way.runs["b"].kill()
    assert under_way.ended("a") == 1, under_way.said("a")
    said = under_way.said("a")
    # gloo says TIMEOUT, too, where the connection is reset while it sends.
    assert re.search(
        r"error: the connection to another process of this run is lost: .*\(gloo: ", said
    )
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("the run ended: ") == 1 and "is lost: " in log, log


def test_a_route_that_comes_back_is_waited_for(machines, flags, straight_on_two, tmp_path):
    machines.cut()
    machines.start("a", flags)
    machines.start("b", flags, MAX_RESTARTS="1")
    wait_for(lambda: "no route to MASTER 10.77.31.1" in machines.said("b"), timeout=90)
    wait_for(lambda: "1 are at MASTER 10.77.31.1:8090: 10.77.31.1" in machines.said("a"))
    machines.cut(False)
    machines.finish_both()
    assert "restart" not in machines.said("b")
    assert_same_end(tmp_path / "run", straight_on_two)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_machine_that_waits_says_for_what_and_ends_by_a_signal(machines, flags, number):
    """Nobody listens at MASTER."""
    machines.start("b", flags)
    # Paddle's launcher handles signals itself once it is imported, seconds later on a busy machine.
    wait_for(lambda: machines.said("b").count("still waiting for 2 machines") >= 5, timeout=90)
    said = machines.said("b")
    assert "this one is 10.77.31.2" in said
    assert "nobody answers at MASTER 10.77.31.1:8090 (" in said and "refused" in said
    machines.runs["b"].send_signal(number)
    assert machines.ended("b", 30) == 128 + number
    assert "Traceback" not in machines.said("b"), machines.said("b")


# Answers nothing that is Paddle's.
STRANGER = """
import http.server
http.server.HTTPServer(("", {port}), http.server.BaseHTTPRequestHandler).serve_forever()
"""


def test_a_port_taken_by_another_program_is_an_error_at_once(machines, flags):
    command = machines.command("a", sys.executable, "-c", STRANGER.format(port=PORT))
    stranger = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        machines.start("b", flags)
        wait_for(lambda: "is not Paddle's launcher" in machines.said("b"), timeout=90)
        machines.start("a", flags)
        assert machines.ended("a", 60) == 2
        assert f"this machine's port {PORT} cannot be used" in machines.said("a")
    finally:
        stranger.kill()
        stranger.wait()


def test_folders_that_are_not_shared_are_noticed(machines, long, tmp_path):
    for node in ADDRESSES:
        output = f"-output={tmp_path / f'run {node}'}"
        machines.start(node, [output if "-output" in flag else flag for flag in long])
    for node in ADDRESSES:
        wait_for(lambda node=node: "1 of 2 machines (NNODES)" in machines.said(node), timeout=120)
        assert "must be one folder that all machines share" in machines.said(node)


def test_machines_that_disagree_about_their_number_are_told(machines, flags):
    machines.start("a", flags, count=3)
    machines.start("b", flags, count=2)
    wait_for(lambda: "still waiting for 3 machines" in machines.said("a"), timeout=90)
    wait_for(
        lambda: "2 are at MASTER 10.77.31.1:8090: 10.77.31.1, 10.77.31.2" in machines.said("a"),
        timeout=90,
    )


def test_the_processes_of_one_machine_hear_of_no_other(machines, run_flags, tmp_path):
    """Nor does the machine's own name have to mean anything."""
    machines.forget_own_name("a")
    flags = [*run_flags, f"-output={tmp_path / 'run'}", "-nproc=2", "-opts", "TRAIN.NUM_EPOCHS", 40]
    machines.start("a", flags, count=1)
    wait_for(lambda: step_of(tmp_path / "run") >= 2, timeout=120)
    listening = subprocess.check_output(
        machines.command("a", "cat", "/proc/net/tcp"), text=True
    ).splitlines()[1:]
    states = [line.split() for line in listening]
    ports = [int(fields[1].rpartition(":")[2], 16) for fields in states if fields[3] == "0A"]
    assert ports
    found = {}
    for node, address in (("a", "127.0.0.1"), ("b", ADDRESSES["a"])):
        code = f"import socket; socket.create_connection(({address!r}, {ports[0]}), timeout=2)"
        command = machines.command(node, sys.executable, "-c", code)
        found[node] = subprocess.run(command, stderr=subprocess.DEVNULL).returncode
    assert machines.runs["a"].poll() is None, machines.said("a")
    assert found == {"a": 0, "b": 1}
