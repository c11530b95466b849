"""This machine, its cores and addresses, and the other machines of a run: whether all are alive.

Nodes started by Paddle's launcher hear nothing of each other: where one fails, the others wait in
a collective for ever. Here each node's launcher writes a file into a folder that they share, every
few seconds, and reads those of the others. It also says what it waits for, which Paddle's launcher
does not.

This module imports the standard library alone.
"""

import array
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import signal
import socket
import struct
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import PARTIAL_SUFFIX, write_text

BEAT_SECONDS = 2.0
LOST_SECONDS = 30.0  # without a sign, after which a node is lost
FIRST_REMINDER_SECONDS, REMINDER_SECONDS = 30.0, 60.0  # of what is waited for
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit statuses of a run that was stopped

ATTEMPT_FILE = "attempt"  # in the log folder of launched processes
NODES_FOLDER = "nodes"  # beside the log folders of the machines

_SIOCGIFCONF = 0x8912  # of Linux's netdevice(7)
_IFREQ = struct.Struct("16s4x4s16x")  # name, of an alias with a colon, and address; on 64 bits


# ---- cores, and the processes of a run that share them


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_launched() -> bool:
    """Return whether `paddle.distributed.launch` started this process."""
    return "PADDLE_TRAINERS_NUM" in os.environ


def processes_on_this_machine(environment=os.environ) -> int:
    """Return how many processes of this run Paddle's launcher has started on this machine."""
    here = environment.get("PADDLE_CURRENT_ENDPOINT", "").rpartition(":")[0]
    endpoints = environment.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    same = sum(endpoint.rpartition(":")[0] == here for endpoint in endpoints) if here else 0
    return max(1, same)


def core_share(environment=os.environ) -> int:
    """Return the available cores divided by the processes of the run on this machine."""
    return max(1, available_cores() // processes_on_this_machine(environment))


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Return the entries of Linux's first processor; none elsewhere."""
    first = ""
    with contextlib.suppress(FileNotFoundError):
        first = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def processor_name() -> str:
    """Return the model of the processor; elsewhere than on Linux, its architecture."""
    return _cpuinfo().get("model name") or platform.machine()


def processor_flags() -> str:
    """Return the features of an x86 processor, with spaces between; "" of another, or elsewhere."""
    return _cpuinfo().get("flags", "")


def processor_has(flag: str) -> bool:
    """Return whether the processor has a feature by its name in /proc/cpuinfo."""
    return flag in processor_flags().split()


# ---- signs of life of the machines of a run


def name_attempt() -> None:
    """Leave, for this machine's `Heartbeat`, a name of this start of the run.

    The name is of the addresses and ports of all processes, which Paddle's launcher has agreed
    with the other machines. Each process calls this once it is started.
    """
    folder = os.environ.get("PADDLE_LOG_DIR")
    endpoints = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "")
    if folder and os.environ.get("PADDLE_RANK_IN_NODE") == "0":
        name = hashlib.sha256(endpoints.encode()).hexdigest()[:16]
        with contextlib.suppress(OSError):
            write_text(os.path.join(folder, ATTEMPT_FILE), name)


class Heartbeat:
    """The signs of life of this machine, and of the others that take part in the same start.

    Clocks are not compared: a node is lost where its file stays the same for LOST_SECONDS. The log
    folder of a machine lies beside those of the others, and its name is the node's.
    """

    def __init__(self, log_dir: str, *, nodes: int, master: str, address: str):
        self.nodes = nodes
        self.master = master
        self.address = address
        self.reminder = Reminder()
        self.log_dir = Path(os.path.abspath(log_dir))
        self.node = self.log_dir.name
        self.count = 0
        # Of each other node, what was last read, and when that had changed on this machine's clock.
        self.seen: dict[str, tuple[str, float]] = {}
        with contextlib.suppress(OSError):
            (self.log_dir / ATTEMPT_FILE).unlink()

    def beat(self) -> tuple[int, str] | None:
        """Give a sign and look for the others'; once another node has failed or is lost, return
        its exit status, or that of a killed process, and a message."""
        folder = self._folder()
        if folder is not None and not self.count:  # now the others' first signs are waited for
            self.reminder = Reminder()
        if self.reminder.is_due():
            missing = self._missing(folder)
            if missing is not None:
                print(missing, file=sys.stderr, flush=True)
        if folder is None:  # the processes of the nodes have not found each other yet
            return None
        self.count += 1
        self._write(folder, "")
        for node, text in self._read_others(folder):
            now = time.monotonic()
            if text != self.seen.get(node, (None, 0))[0]:
                self.seen[node] = text, now
            _, status, message = (text.split("\n", 2) + ["", ""])[:3]
            if status:
                if int(status) not in (0, *STOPPED):
                    return int(status), (
                        f"error: machine {node} has failed with status {status}"
                        f"{': ' if message else ''}{message}"
                    )
            elif now - self.seen[node][1] > LOST_SECONDS:
                return 128 + signal.SIGKILL, (
                    f"error: machine {node} has given no sign for {LOST_SECONDS:g} s; this run "
                    "ends on all its machines"
                )
        return None

    def end(self, status: int, message: str) -> None:
        """Tell the others how this machine's part of the run ended."""
        folder = self._folder()
        if folder is not None:
            self._write(folder, f"{status}\n{message}")

    def _missing(self, folder: Path | None) -> str | None:
        """Return what to say where a machine is missing."""
        if folder is None:
            return (
                f"still waiting for {self.nodes} machines (NNODES); this one is {self.address}, "
                f"and {who_is_there(self.master)}"
            )
        seen = 1 + len(self._read_others(folder))
        if seen < self.nodes:
            return (
                f"{seen} of {self.nodes} machines (NNODES) give signs of life in {folder}: -output "
                "must be one folder that all machines share, and NNODES the same on each"
            )
        return None

    def _folder(self) -> Path | None:
        """Return where the nodes of this start of the run write; None until it has a name."""
        try:
            name = (self.log_dir / ATTEMPT_FILE).read_text(encoding="utf-8")
        except OSError:
            return None
        return self.log_dir.parent / NODES_FOLDER / name

    def _write(self, folder: Path, end: str) -> None:
        """Write this node's sign; a full or slow disk does not stop a run."""
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / self.node, f"{self.count}\n{end}")

    def _read_others(self, folder: Path) -> list[tuple[str, str]]:
        """Return names and contents of the other nodes' files; none from an unreadable folder."""
        found = []
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                if path.name != self.node and path.suffix != PARTIAL_SUFFIX:
                    found.append((path.name, path.read_text(encoding="utf-8")))
        return found


class Reminder:
    """When it is time to say again what is waited for."""

    def __init__(self):
        self.next = time.monotonic() + FIRST_REMINDER_SECONDS

    def is_due(self) -> bool:
        if time.monotonic() < self.next:
            return False
        self.next += REMINDER_SECONDS
        return True


# ---- the server of Paddle's launcher at MASTER, ADDRESS:PORT


def who_is_there(master: str) -> str:
    """Return which machines have found the server at MASTER, or why it is not there."""
    try:
        addresses = addresses_at(master)
    except (OSError, ValueError) as error:
        is_silent = isinstance(error, urllib.error.URLError) and not hasattr(error, "code")
        if not is_silent:
            return f"what answers at MASTER {master} is not Paddle's launcher but another program"
        return (
            f"nobody answers at MASTER {master} ({error.reason}): the run must be started on that "
            "machine as well, and the port must be open"
        )
    return f"{len(addresses)} are at MASTER {master}: {', '.join(addresses) or 'none'}"


def addresses_at(master: str) -> list[str]:
    """Return the addresses of the machines that the server at MASTER knows; OSError or ValueError
    where nothing answers, or something else does."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{master}/", timeout=5) as reply:
        found = json.loads(reply.read())
    try:
        if found["/healthy"] != "ok":
            raise KeyError
        machines = [json.loads(found[key]) for key in found if "/info/" in key]
        return sorted(machine["candidate"].rpartition(":")[0] for machine in machines)
    except (TypeError, KeyError, AttributeError):
        raise ValueError("not Paddle's launcher") from None


def check_port(master: str) -> None:
    """Raise InputError where MASTER means this machine and another program has its port."""
    address, port = master.rsplit(":", 1)
    if not is_own_address(address):
        return
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", int(port)))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            with contextlib.suppress(OSError, ValueError):
                addresses_at(master)
                return  # another node on this machine
        raise InputError(
            f"MASTER is {master}, and this machine's port {port} cannot be used "
            f"({error.strerror.lower()}); allowed: a free port from 1024 to 65535"
        ) from None


# ---- addresses


def node_addresses(master: str) -> tuple[str, str]:
    """Return ADDRESS:PORT of the master, HOST:PORT, and the ADDRESS under which other nodes reach
    this machine: the same one on the machine that MASTER means.

    Paddle's launcher starts the server of `--master` only on the machine whose `--host` is the same
    text, and hands its own address, by default whatever its name resolves to, to the other nodes.
    Debian lets a machine's name mean 127.0.1.1, which is of no use to them.
    """
    host, port = master.rsplit(":", 1)
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise InputError(
            f"MASTER is {master}, and {host} does not resolve ({error}); allowed: HOST:PORT of one "
            "of the machines, by a name or an IPv4 address that all of them know"
        ) from None
    if host not in (address, "localhost") and address.startswith("127."):
        address = address_for_others() or address
    return f"{address}:{port}", address if is_own_address(address) else wait_for_route(address)


def wait_for_route(destination: str) -> str:
    """Return this machine's address on the way to another one, as soon as there is a way."""
    reminder = Reminder()
    while (address := outgoing_address(destination)) is None:
        if reminder.is_due():
            waits = f"still waiting for a network: no route to MASTER {destination}"
            print(waits, file=sys.stderr, flush=True)
        time.sleep(1)
    return address


def interfaces() -> dict[str, str]:
    """Return the names of the network interfaces that are up by IPv4 address; on Linux alone."""
    if sys.platform != "linux":
        return {}
    entries = array.array("B", bytes(256 * _IFREQ.size))
    request = struct.pack("iL", len(entries), entries.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        used, _ = struct.unpack("iL", fcntl.ioctl(probe, _SIOCGIFCONF, request))
    return {
        socket.inet_ntoa(address): re.match(rb"[^\0:]*", name)[0].decode()
        for name, address in _IFREQ.iter_unpack(entries[:used])
    }


def address_for_others() -> str | None:
    """Return this machine's address on the way out, or else of its first non-loopback interface."""
    others = (address for address in interfaces() if not address.startswith("127."))
    return outgoing_address("192.0.2.1") or next(others, None)  # any address beyond this network


def is_own_address(address: str) -> bool:
    """Return whether this machine has this IPv4 address."""
    with socket.socket() as listener:
        try:
            listener.bind((address, 0))
        except OSError:
            return False
    return True


def outgoing_address(destination: str) -> str | None:
    """Return this machine's address on the way to another one; None without a route. It sends
    nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((destination, 9))
        except OSError:
            return None
        return probe.getsockname()[0]
