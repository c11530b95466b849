"""The command `replknet`: one module per subcommand, with flags and printing, no logic.

A module has a docstring, whose first line `replknet -h` shows; `add_arguments(parser)`; and
`run(args) -> int`, the exit status. Modules import nothing slow before `run`: help answers at once,
and Paddle is imported when the work begins. `EXAMPLES`, if there, ends the command's help.
"""

import argparse
import importlib
import logging
import os
import sys
import warnings

from replknet_paddle.runtime.errors import InputError, SystemFault

COMMANDS = (
    *("train", "eval", "predict", "page", "export", "merge", "convert", "benchmark"),
    *("make-lists", "check-data", "make-digits", "model-info", "plot", "erf", "kernels", "build"),
    *("segment", "make-shapes"),
)

DESCRIPTION = """\
RepLKNet in PaddlePaddle: train, evaluate, predict, export and measure large-kernel networks.

`replknet NAME -h` explains each command."""


def main(argv: list[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the arguments; None for those of this process.

    Returns:
        Exit status: 0; 2 for bad input; others as the command says.
    """
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
        names.add_parser(name, help=command_module(name).__doc__.splitlines()[0], add_help=False)
    parser.parse_args(argv)  # prints help, or says what is wrong
    return 2


def run_command(name: str, argv: list[str], prog: str | None = None) -> int:
    """Run one command with its arguments; the exit status.

    Args:
        prog: how the user called it; None: `replknet NAME`.
    """
    module = command_module(name)
    parser = argparse.ArgumentParser(
        prog=prog or f"replknet {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=getattr(module, "EXAMPLES", None),
    )
    module.add_arguments(parser)
    args = parser.parse_args(argv)
    args.argv = argv
    os.environ.setdefault("GLOG_minloglevel", "2")  # before Paddle: its notes on every export
    warnings.filterwarnings("ignore", message="No ccache found")  # Paddle's, at every start
    logging.basicConfig(format="%(message)s")  # on standard error; libraries' warnings as well
    logging.getLogger("replknet_paddle").setLevel(logging.INFO)
    try:
        return module.run(args)
    except BrokenPipeError:  # the reader of the output has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  Python's last flush must not fail
        return 141
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemFault as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def command_module(name: str):
    """The module of a command."""
    return importlib.import_module(f"replknet_paddle.commands.{name.replace('-', '_')}")
