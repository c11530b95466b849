"""Pickles that try to run code, in every pickled format: refused by name, and nothing ran.

An audit hook watches the interpreter itself, so that "nothing ran" means no import, no execution of
code, no process, no file opened for writing, whatever the attack would have done with it.
"""

import os
import pickle
import sys
from pathlib import Path

import pytest
from handmade import (
    Call,
    Made,
    Name,
    Raw,
    Reference,
    encode,
    numbers,
    pickled,
    tensor,
    torch_legacy,
    torch_zip,
)

from replknet_paddle.checkpoints.readers import read_checkpoint
from replknet_paddle.checkpoints.unpickle import _STEPS, Unpickler
from replknet_paddle.runtime.errors import InputError

BASE = numbers(4)

# A shell command is all that a real attack needs; this one cannot even do harm if it runs.
COMMAND = "true"


def call(function: str, *arguments) -> Call:
    return Call(Name(*function.rsplit(".", 1)), arguments)


def opcodes(*parts) -> Raw:
    return Raw(b"".join(part if type(part) is bytes else encode(part) for part in parts))


NESTED = pickled(call("os.system", COMMAND))

# What a pickle calls, and with what. The message names the function.
CALLS = [
    ("os.system", COMMAND),
    ("posix.system", COMMAND),
    ("builtins.eval", '__import__("os").system("true")'),
    ("builtins.eval", "data()", {"data": 1}),
    ("builtins.eval", "data", {"data": 1, "len": 2}),
    ("__builtin__.eval", "1"),
    ("builtins.exec", "import os"),
    ("builtins.__import__", "os"),
    ("builtins.str", "x"),
    ("builtins.getattr", "x", "join"),
    ("operator.attrgetter", "system"),
    ("functools.partial", COMMAND),
    ("subprocess.Popen", [COMMAND]),
    ("runpy._run_code", "import os", {}),
    ("torch.storage._load_from_bytes", NESTED),
    ("torch.load", "x"),
    ("pickle.loads", NESTED),
    ("numpy.load", "x.npy"),
    ("numpy.f2py.crackfortran.myeval", "1"),
]

# Other ways to a function -> (value to put into a pickle, what the message names).
ATTACKS = {
    **{f"{name}{arguments}": (call(name, *arguments), name.split(".")[-1])
       for name, *arguments in CALLS},
    "nested call": (call("collections.OrderedDict", [("x", call(*CALLS[0]))]), "os.system"),
    "call of a result": (Call(call("collections.OrderedDict"), ()), "not a function"),
    "call of text": (Call("os.system", (COMMAND,)), "not a function"),
    "arguments in a list": (opcodes(Name("builtins", "set"), [1], b"R"), "not a function"),
    "object with a state": (Made(Name("shutil", "Thing"), {"x": 1}), "shutil.Thing"),
    "model class": (Made(Name("models.replknet", "RepLKNet"), {}), "models.replknet.RepLKNet"),
    "state of a name": (opcodes(Name("builtins", "set"), {"x": 1}, b"b"), "state of a Name"),
    "instance": (opcodes(b"(", COMMAND, b"ios\nsystem\n"), "os.system"),
    "old-style object": (opcodes(b"(cos\nsystem\n", COMMAND, b"o"), "os.system"),
    "new object with keywords": (opcodes(b"csubprocess\nPopen\n)}\x92"), "subprocess.Popen"),
    "name from the stack": (opcodes("os", "system", b"\x93", (COMMAND,), b"R"), "os.system"),
    "dotted name": (opcodes("builtins", "dict.fromkeys", b"\x93"), "dict.fromkeys"),
    "attribute": (opcodes("_codecs", "encode.__globals__", b"\x93"), "__globals__"),
    "registered extension": (opcodes(b"\x82\x01)R"), "opcode"),
    "copyreg": (
        call("copyreg._reconstructor", Name("os", "environ"), Name("builtins", "object"), None),
        "os.environ",
    ),
    "copyreg of a function": (
        call("copyreg._reconstructor", Name("_codecs", "encode"), Name("builtins", "object"), None),
        "form",
    ),
    "default factory": (call("collections.defaultdict", Name("os", "getcwd")), "os.getcwd"),
    "codec": (call("_codecs.encode", "x", "rot13"), "rot13"),
}  # fmt: skip

# Format -> file around a value. Values go where PyTorch and Paddle put tensors, names and options.
FORMATS = {
    "torch zip": lambda value: torch_zip(
        {"model": {"x": tensor(BASE, "0"), "y": value}}, {"0": BASE}
    ),
    "torch zip, storage reference": lambda value: torch_zip(
        {"x": Reference(("storage", value, "0", "cpu", 4))}, {"0": BASE}
    ),
    "torch zip, storage key": lambda value: torch_zip(
        {"x": tensor(BASE, "0", key=value)}, {"0": BASE}
    ),
    "torch zip, hooks": lambda value: torch_zip(
        {"x": call("torch._utils._rebuild_parameter", tensor(BASE, "0"), True, value)},
        {"0": BASE},
    ),
    "torch legacy": lambda value: torch_legacy({"x": tensor(BASE, "0"), "y": value}, {"0": BASE}),
    "torch legacy, system": lambda value: torch_legacy({}, {}, system={"x": value}),
    "torch legacy, protocol": lambda value: torch_legacy({}, {}, version=value),
    "torch legacy, storage keys": lambda value: torch_legacy({}, {})[:-4] + encode(value) + b".",
    "paddle": lambda value: pickled({"w": b"1234", "epoch": value}),
    "paddle protocol 4": lambda value: b"\x80\x04" + encode({"x": [value]}) + b".",
    "paddle, named tensor": lambda value: pickled({"w": call("builtins.tuple", ("w", value))}),
    "paddle, dense tensor": lambda value: pickled(
        {"w": call("builtins.eval", "data", {"data": value})}
    ),
}

_events: list[str] = []
_watching = False
_WATCHED = ("import", "exec", "compile", "os.", "subprocess.", "pickle.", "socket.", "ctypes.")


def _watch(event: str, arguments: tuple) -> None:
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if _watching and (event.startswith(_WATCHED) or writes):
        _events.append(f"{event} {arguments}")


sys.addaudithook(_watch)


@pytest.fixture(scope="module", autouse=True)
def read_once(tmp_path_factory):
    """Lets Python import what reading any file needs (the codec of zip archives' names)."""
    path = tmp_path_factory.mktemp("once") / "checkpoint"
    path.write_bytes(torch_zip({"x": tensor(BASE, "0")}, {"0": BASE}))
    read_checkpoint(path)


@pytest.fixture
def ran():
    """What the interpreter was seen to do while a function was called."""

    def call(function) -> list[str]:
        global _watching
        _events.clear()
        _watching = True
        try:
            function()
        finally:
            _watching = False
        return list(_events)

    return call


def test_the_watch_sees_what_an_unsafe_loader_would_do(ran):
    assert any("os.system" in event for event in ran(lambda: pickle.loads(NESTED)))


@pytest.mark.parametrize("attack", ATTACKS)
def test_refused_by_name_in_every_format_and_nothing_ran(attack, tmp_path, ran):
    value, name = ATTACKS[attack]
    messages = {}

    def read(path: Path) -> None:
        try:
            read_checkpoint(path)
        except InputError as error:
            messages[path.name] = str(error)

    for format_name, make in FORMATS.items():
        path = tmp_path / format_name
        path.write_bytes(make(value))
        assert ran(lambda path=path: read(path)) == [], format_name
        assert messages[format_name].startswith(f"{path}: "), format_name
        assert name in messages[format_name], format_name


def test_no_opcode_that_finds_or_calls_is_pythons_own():
    """And those that only other protocols or programs need do not exist."""
    own = pickle._Unpickler.dispatch
    for opcode in (pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD):
        assert _STEPS[opcode[0]] is not own[opcode[0]]
    for method in ("find_class", "persistent_load"):
        assert getattr(Unpickler, method) is not getattr(pickle._Unpickler, method)
    for name in ("EXT1", "EXT2", "EXT4", "OBJ", "NEWOBJ_EX", "PERSID", "NEXT_BUFFER", "DUP"):
        assert getattr(pickle, name)[0] not in _STEPS


def test_message_says_that_nothing_ran_and_what_to_do(tmp_path):
    path = tmp_path / "checkpoint"
    path.write_bytes(NESTED)
    with pytest.raises(InputError, match="Nothing was run.*ask for one that holds the weights"):
        read_checkpoint(path)


def test_members_that_are_pickles_are_only_bytes(tmp_path, ran):
    """A storage's content is never unpickled, whatever it looks like."""
    storage = numbers(len(NESTED), dtype="f4")
    path = tmp_path / "checkpoint"
    data = torch_zip({"x": tensor(storage, "0")}, {"0": storage}, **{"data.pkl.bak": NESTED})
    path.write_bytes(data.replace(storage.tobytes(), (NESTED * 4)[: storage.nbytes]))
    assert ran(lambda: read_checkpoint(path)) == []
