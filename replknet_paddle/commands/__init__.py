"""The command `replknet`: its subcommands by family, with flags and printing, no logic.

For the command NAME, the module that `COMMANDS` names has `add_NAME_flags(parser)` and
`run_NAME(args) -> int`, the exit status, whose docstring is the help: its first line is what
`replknet -h` shows, and what begins with "example" ends it. Modules import nothing slow before
that: help answers at once, and Paddle is imported when the work begins.
"""

import argparse
import importlib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable

from replknet_paddle.runtime.errors import OUT_OF_MEMORY, InputError, SystemFault
from replknet_paddle.runtime.terminal import Terminal

COMMANDS = {
    "train": "train",
    "eval": "train",
    "predict": "predict",
    "page": "predict",
    "export": "export",
    "merge": "export",
    "convert": "export",
    "benchmark": "benchmark",
    "make-lists": "data",
    "check-data": "data",
    "make-digits": "data",
    "model-info": "analyze",
    "plot": "analyze",
    "erf": "analyze",
    "kernels": "analyze",
    "build": "export",
    "segment": "segment",
    "make-shapes": "data",
}

DESCRIPTION = """\
RepLKNet in PaddlePaddle: train, evaluate, predict, export and measure large-kernel networks.

`replknet NAME -h` explains each command."""


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return its exit status: 0; 2 for bad input; others as commands say."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return run_command(argv[0], argv[1:])
    parser = argparse.ArgumentParser(
        prog="replknet",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: replknet predict output/RUN/best photos",
    )
    names = parser.add_subparsers(metavar="NAME", required=True)
    for name in COMMANDS:
        names.add_parser(name, help=help_of(name)[0].splitlines()[0], add_help=False)
    parser.parse_args(argv)  # prints help, or says what is wrong
    return 2


def run_command(name: str, argv: list[str], prog: str | None = None) -> int:
    """Run one command, which the user called as `prog`; return its exit status."""
    if not isinstance(sys.stdout, Terminal):
        sys.stdout, sys.stderr = Terminal(sys.stdout), Terminal(sys.stderr)
    try:
        return parse_and_run(name, argv, prog)
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
    parser = argparse.ArgumentParser(
        prog=prog or f"replknet {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=examples,
    )
    command_function(name, "add_{}_flags")(parser)
    args = parser.parse_args(argv)
    for key, value in vars(args).items():
        if value == "" or key != "opts" and isinstance(value, list) and "" in value:
            raise InputError(f"{key} is empty; give a value (is a variable of the shell not set?)")
    args.argv = argv
    os.environ.setdefault("GLOG_minloglevel", "2")  # before Paddle: its notes on every export
    os.environ["MPLBACKEND"] = "agg"  # before matplotlib, which fails on a notebook's elsewhere
    warnings.filterwarnings("ignore", message="No ccache found")  # Paddle's, at every start
    logging.basicConfig(format="%(message)s")  # on standard error; libraries' warnings as well
    logging.getLogger("replknet_paddle").setLevel(logging.INFO)
    return command_function(name, "run_{}")(args)


def help_of(name: str) -> tuple[str, str | None]:
    """Return the description of a command, and its examples or None."""
    text = inspect.getdoc(command_function(name, "run_{}"))
    description, *examples = re.split(r"\n\n(?=examples?:)", text, maxsplit=1)
    return description, examples[0] if examples else None


def command_function(name: str, pattern: str) -> Callable:
    """Return a function of a command, such as "run_{}"."""
    module = importlib.import_module(f"replknet_paddle.commands.{COMMANDS[name]}")
    return getattr(module, pattern.format(name.replace("-", "_")))
