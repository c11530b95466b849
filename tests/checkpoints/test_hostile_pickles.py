"""Pickles that try to run code, in every pickled format: refused by name, and nothing ran.

An audit hook watches the interpreter itself, so that "nothing ran" means no import, no execution of
code, no process, no file opened for writing, whatever the attack would have done with it.
"""

import os
import pickle
import sys

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
from replknet_paddle.runtime.errors import InputError

BASE = numbers(4)

# A shell command is all that a real attack needs; this one cannot even do harm if it runs.
COMMAND = "true"

NESTED = pickled(Call(Name("os", "system"), (COMMAND,)))

# Attack -> (value to put into a pickle, what the message names).
ATTACKS = {
    "os.system": (Call(Name("os", "system"), (COMMAND,)), "os.system"),
    "posix.system": (Call(Name("posix", "system"), (COMMAND,)), "posix.system"),
    "eval": (Call(Name("builtins", "eval"), ('__import__("os").system("true")',)), "eval"),
    "eval with names": (Call(Name("builtins", "eval"), ("data()", {"data": 1})), "eval"),
    "eval with two names": (
        Call(Name("builtins", "eval"), ("data", {"data": 1, "len": 2})),
        "eval",
    ),
    "Python 2 eval": (Call(Name("__builtin__", "eval"), ("1",)), "eval"),
    "exec": (Call(Name("builtins", "exec"), ("import os",)), "builtins.exec"),
    "import": (Call(Name("builtins", "__import__"), ("os",)), "builtins.__import__"),
    "getattr": (
        Call(Call(Name("builtins", "getattr"), (Name("os", "path"), "join")), ()),
        "builtins.getattr",
    ),
    "subprocess": (Call(Name("subprocess", "Popen"), ([COMMAND],)), "subprocess.Popen"),
    "runpy": (Call(Name("runpy", "_run_code"), ("import os", {})), "runpy._run_code"),
    "nested reduction": (
        Call(
            Name("collections", "OrderedDict"), ([("x", Call(Name("os", "system"), (COMMAND,)))],)
        ),
        "os.system",
    ),
    "function from a reduction": (
        Call(Call(Name("operator", "attrgetter"), ("system",)), (Name("os", "path"),)),
        "operator.attrgetter",
    ),
    "partial": (
        Call(Name("functools", "partial"), (Name("os", "system"), COMMAND)),
        "functools.partial",
    ),
    "object with a state": (Made(Name("shutil", "Thing"), {"x": 1}), "shutil.Thing"),
    "instance": (Raw(b"(" + encode(COMMAND) + b"ios\nsystem\n"), "os.system"),
    "old-style object": (Raw(b"(cos\nsystem\n" + encode(COMMAND) + b"o"), "os.system"),
    "new object with keywords": (Raw(b"csubprocess\nPopen\n)}\x92"), "subprocess.Popen"),
    "name from the stack": (
        Raw(encode("os") + encode("system") + b"\x93" + encode((COMMAND,)) + b"R"),
        "os.system",
    ),
    "dotted name": (Raw(encode("builtins") + encode("dict.fromkeys") + b"\x93"), "dict.fromkeys"),
    "registered extension": (Raw(b"\x82\x01)R"), "opcode"),
    "pickle in a torch storage": (
        Call(Name("torch.storage", "_load_from_bytes"), (NESTED,)),
        "torch.storage._load_from_bytes",
    ),
    "torch.load": (Call(Name("torch", "load"), ("x",)), "torch.load"),
    "pickle.loads": (Call(Name("pickle", "loads"), (NESTED,)), "pickle.loads"),
    "copyreg": (
        Call(
            Name("copyreg", "_reconstructor"),
            (Name("os", "environ"), Name("builtins", "object"), None),
        ),
        "os.environ",
    ),
    "copyreg of a function": (
        Call(
            Name("copyreg", "_reconstructor"),
            (Name("_codecs", "encode"), Name("builtins", "object"), None),
        ),
        "form",
    ),
    "default factory": (
        Call(Name("collections", "defaultdict"), (Name("os", "getcwd"),)),
        "os.getcwd",
    ),
    "codec": (Call(Name("_codecs", "encode"), ("x", "rot13")), "rot13"),
    "numpy file": (Call(Name("numpy", "load"), ("x.npy",)), "numpy.load"),
    "numpy eval": (Call(Name("numpy.f2py.crackfortran", "myeval"), ("1",)), "myeval"),
    "attribute of a stand-in": (
        Raw(encode("numpy.core.multiarray") + encode("scalar.build.__globals__") + b"\x93"),
        "__globals__",
    ),
    "call of a type": (Call(Name("builtins", "str"), ("x",)), "builtins.str"),
    "model class": (Made(Name("models.replknet", "RepLKNet"), {}), "models.replknet.RepLKNet"),
}

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
        {"x": Call(Name("torch._utils", "_rebuild_parameter"), (tensor(BASE, "0"), True, value))},
        {"0": BASE},
    ),
    "torch legacy": lambda value: torch_legacy({"x": tensor(BASE, "0"), "y": value}, {"0": BASE}),
    "torch legacy, system": lambda value: torch_legacy({}, {}, system={"x": value}),
    "torch legacy, protocol": lambda value: torch_legacy({}, {}, version=value),
    "torch legacy, storage keys": lambda value: torch_legacy({}, {})[:-4] + encode(value) + b".",
    "paddle": lambda value: pickled({"w": b"1234", "epoch": value}),
    "paddle protocol 4": lambda value: b"\x80\x04" + encode({"x": [value]}) + b".",
    "paddle, named tensor": lambda value: pickled(
        {"w": Call(Name("builtins", "tuple"), (("w", value),))}
    ),
    "paddle, dense tensor": lambda value: pickled(
        {"w": Call(Name("builtins", "eval"), ("data", {"data": value}))}
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
@pytest.mark.parametrize("format_name", FORMATS)
def test_refused_by_name_and_nothing_ran(format_name, attack, tmp_path, ran):
    value, name = ATTACKS[attack]
    path = tmp_path / "checkpoint"
    path.write_bytes(FORMATS[format_name](value))
    caught = []

    def read():
        try:
            read_checkpoint(path)
        except InputError as error:
            caught.append(str(error))

    events = ran(read)
    assert events == []
    assert caught and caught[0].startswith(f"{path}: ")
    assert name in caught[0]


def test_message_says_that_nothing_ran_and_what_to_do(tmp_path):
    path = tmp_path / "checkpoint"
    path.write_bytes(pickled({"x": ATTACKS["os.system"][0]}))
    with pytest.raises(InputError, match="Nothing was run.*ask for one that holds the weights"):
        read_checkpoint(path)


def test_members_that_are_pickles_are_only_bytes(tmp_path, ran):
    """A storage's content is never unpickled, whatever it looks like."""
    storage = numbers(len(NESTED), dtype="f4")
    path = tmp_path / "checkpoint"
    data = torch_zip({"x": tensor(storage, "0")}, {"0": storage}, **{"data.pkl.bak": NESTED})
    path.write_bytes(data.replace(storage.tobytes(), (NESTED * 4)[: storage.nbytes]))
    assert ran(lambda: read_checkpoint(path)) == []
