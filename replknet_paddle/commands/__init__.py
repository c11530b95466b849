"""The command `replknet`: its subcommands by family, with flags and printing, no logic.

For the command NAME, the module that `COMMANDS` names has `add_NAME_flags(parser)` and
`run_NAME(args) -> int`, the exit status, whose docstring is the help: its first line is what
`replknet -h` shows, and what begins with "example" ends it. Modules import nothing slow before
that: help answers at once, and Paddle is imported when the work begins.
"""

import importlib
import inspect
import logging
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterable

import replknet_paddle
from replknet_paddle.commands.flags import CommandParser
from replknet_paddle.runtime.errors import OUT_OF_MEMORY, InputError, SystemFault, did_you_mean
from replknet_paddle.runtime.progress import LogLines
from replknet_paddle.runtime.terminal import Terminal

COMMANDS = {
    "train": "train",
    "eval": "train",
    "predict": "predict",
    "embed": "predict",
    "probe": "analyze",
    "page": "predict",
    "export": "export",
    "merge": "export",
    "convert": "export",
    "calibrate": "export",
    "make-lists": "data",
    "check-data": "data",
    "make-digits": "data",
    "model-info": "analyze",
    "plot": "analyze",
    "erf": "analyze",
    "kernels": "analyze",
    "build": "export",
    "segment train": "segment",
    "segment eval": "segment",
    "segment predict": "segment",
    "make-shapes": "data",
    "make-solar-cells": "data",
    "benchmark conv": "benchmark",
    "benchmark network": "benchmark",
    "benchmark train_loop": "benchmark",
    "benchmark inference": "benchmark",
    "benchmark data": "benchmark",
}

DESCRIPTION = """\
RepLKNet in PaddlePaddle: train, evaluate, predict, export and measure large-kernel networks.

`replknet NAME -h` explains each command."""


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return its exit status: 0; 2 for bad input; others as commands say."""
    argv = sys.argv[1:] if argv is None else argv
    for words in (1, 2):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return run_command(name, argv[words:])
    return with_messages(lambda: answer(argv))


def answer(argv: list[str]) -> int:
    """Answer a command line without a command; return its exit status."""
    group = [name for name in COMMANDS if name.split()[:-1] == argv[:1]]
    if argv in (["--version"], ["-version"]):
        print(version(), flush=True)
    elif argv and argv[-1] in ("-h", "-help", "--help"):
        print(overview(group or COMMANDS), flush=True)
    elif group and len(argv) == 1:
        raise InputError(f"{argv[0]} is a group of commands: {', '.join(group)}")
    else:
        words = " ".join(word for word in argv[: 2 if group else 1] if not word.startswith("-"))
        near = did_you_mean(words, group or COMMANDS) or "; `replknet -h` lists the commands"
        raise InputError(
            f"unknown command {words}{near}" if words else "no command; `replknet -h` lists them"
        )
    return 0


def overview(names: Iterable[str]) -> str:
    """Return the help on some commands."""
    width = max(map(len, names))
    lines = [f"  {name:{width}}  {help_of(name)[0].splitlines()[0]}" for name in names]
    return "\n".join([DESCRIPTION, "", *lines, "", "example: replknet predict output/RUN photos"])


def version() -> str:
    """Return the versions of this package, Paddle and Python, and the device in use."""
    silence_paddle()

    import paddle

    from replknet_paddle.runtime.machines import processor_name
    from replknet_paddle.runtime.processes import on_gpu

    device = paddle.device.cuda.get_device_name() if on_gpu() else f"CPU, {processor_name()}"
    return (
        f"replknet_paddle {replknet_paddle.__version__}, Paddle {paddle.__version__}, "
        f"Python {platform.python_version()}, {device}"
    )


def run_command(name: str, argv: list[str], prog: str | None = None) -> int:
    """Run one command, which the user called as `prog`; return its exit status."""
    return with_messages(lambda: parse_and_run(name, argv, prog))


def with_messages(run: Callable[[], int]) -> int:
    """Return the exit status that `run` returns, or print the message of what it raises."""
    if not isinstance(sys.stdout, Terminal):
        sys.stdout, sys.stderr = Terminal(sys.stdout), Terminal(sys.stderr)
    try:
        return run()
    except BrokenPipeError:  # the reader of the output has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  Python's last flush must not fail
        return 141
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemFault as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except MemoryError:  # Paddle's comes with pages of C++ calls
        print(f"error: {OUT_OF_MEMORY}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse_and_run(name: str, argv: list[str], prog: str | None) -> int:
    """Parse the flags of one command, prepare logging and run it."""
    description, examples = help_of(name)
    parser = CommandParser(
        name, prog=prog or f"replknet {name}", description=description, epilog=examples
    )
    command_function(name, "add_{}_flags")(parser)
    args, words = parser.parse(argv)
    parser.refuse_empty(args)
    args.command, args.words = name.split(), words  # for processes to be started
    silence_paddle()
    os.environ["MPLBACKEND"] = "agg"  # before matplotlib, which fails on a notebook's elsewhere
    # On standard error; libraries' warnings as well.
    logging.basicConfig(format="%(message)s", handlers=[LogLines()])
    logging.getLogger("replknet_paddle").setLevel(logging.INFO)
    return command_function(name, "run_{}")(args)


def silence_paddle() -> None:
    """Leave out Paddle's notes at its import and on every export."""
    os.environ.setdefault("GLOG_minloglevel", "2")
    warnings.filterwarnings("ignore", message="No ccache found")


def help_of(name: str) -> tuple[str, str | None]:
    """Return the description of a command, and its examples or None."""
    text = inspect.getdoc(command_function(name, "run_{}"))
    description, *examples = re.split(r"\n\n(?=examples?:)", text, maxsplit=1)
    return description, examples[0] if examples else None


def command_function(name: str, pattern: str) -> Callable:
    """Return a function of a command, such as "run_{}"."""
    module = importlib.import_module(f"replknet_paddle.commands.{COMMANDS[name]}")
    return getattr(module, pattern.format(re.sub("[- ]", "_", name)))
