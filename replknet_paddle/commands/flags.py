"""The grammar of command lines: flags and the argument MODEL, as all commands have them.

A flag has one name. It is typed with one dash or two, with `_` or `-` between its words, and takes
its value after a blank or after `=`. MODEL is the first argument wherever a command has one.
"""

import argparse
import os
import re
import sys

from replknet_paddle.runtime.errors import InputError, did_you_mean

WEIGHTS_FORMS = "published name, YAML file, checkpoint file, or run folder (output/RUN)"
MODEL_FORMS = f"{WEIGHTS_FORMS}, or export folder"

FLAG = re.compile(r"--?([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)

# What 0.2 called flags, by command; None: a flag that is gone. To be deleted after one release,
# with `_in_todays_spelling`.
MODEL = "MODEL"
FLAGS_OF_0_2 = {
    "predict": {"out": "output"},
    "plot": {"out": "output"},
    "erf": {"pretrained": MODEL, "out": "output", "input_size": "image_size"},
    "kernels": {"pretrained": MODEL, "out": "output"},
    "export": {"pretrained": MODEL},
    "merge": {"pretrained": MODEL},
    "check-data": {"report": "output"},
    "model-info": {"cfg": MODEL},
    "benchmark inference": {"pretrained": MODEL, "json": "output", "chart": None},
    "benchmark network": {"cfg": MODEL},
    "benchmark train_loop": {"cfg": MODEL},
}
LAST_ARGUMENT_WAS_OUTPUT = ("export", "merge", "convert")


class CommandParser(argparse.ArgumentParser):
    """The parser of the command `name`: `parse` is `parse_args` for the grammar above."""

    def __init__(self, name: str, **options):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )
        self.name = name
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's leaves -1e-3 out

    def parse(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return the values, and the words in today's spelling, for processes to be started."""
        flags, arguments = self._split(self._in_todays_spelling(argv))
        is_named = any(flag.startswith("-output=") for flag in flags)
        if self.name in LAST_ARGUMENT_WAS_OUTPUT and len(arguments) == 2 and not is_named:
            self._say_new("the argument DST", "now -output")
            flags.append(f"-output={arguments.pop()}")
        several = {"+": " ...", "*": " ..."}
        places = [f"{a.metavar}{several.get(a.nargs, '')}" for a in self._get_positional_actions()]
        self.usage = " ".join([self.prog, *places, "[FLAG ...]"])
        if arguments and not places:
            self.error(f"argument {arguments[0]}; allowed: flags alone, which {self.prog} -h lists")
        words = [*flags, "--", *arguments] if arguments else flags
        return self.parse_args(words), words

    def refuse_empty(self, args: argparse.Namespace) -> None:
        """Raise InputError for a value that is empty, by the name that was typed."""
        for action in self._actions:
            value = getattr(args, action.dest, None)
            if value == "" or action.dest != "opts" and isinstance(value, list) and "" in value:
                name = (action.option_strings or [action.metavar])[-1]
                raise InputError(
                    f"{name} is empty; give a value (is a variable of the shell not set?)"
                )

    def _split(self, argv: list[str]) -> tuple[list[str], list[str]]:
        """Return the flags, in their own spelling and with their values, and the other words."""
        known = {flag.lstrip("-"): action for flag, action in self._option_string_actions.items()}
        known |= {"o": known["output"]} if "output" in known else {}
        flags, arguments, words = [], [], list(argv)
        while words:
            word = words.pop(0)
            if word == "--":
                return flags, arguments + words
            match = FLAG.fullmatch(word)
            if match is None:
                arguments.append(word)
                continue
            name, value = match[1].replace("-", "_"), match[2]
            if name not in known:
                near = did_you_mean(name, known, "-")
                self.error(f"unknown flag {word}{near or f'; {self.prog} -h lists the flags'}")
            takes = known[name].nargs  # None: one value
            if value is None and takes is None and words and not FLAG.match(words[0]):
                value = words.pop(0)
            spelled = known[name].option_strings[-1]
            if takes == "+" and value is not None:
                flags += [spelled, value]
            else:
                flags.append(spelled if value is None else f"{spelled}={value}")
            while takes == "+" and words and not FLAG.match(words[0]):
                flags.append(words.pop(0))
        return flags, arguments

    def _in_todays_spelling(self, argv: list[str]) -> list[str]:
        """Return a command line of 0.2 as it is spelled now, and say what is new."""
        old, model, spelled, words = FLAGS_OF_0_2.get(self.name, {}), [], [], list(argv)
        while words:
            word = words.pop(0)
            match = FLAG.fullmatch(word)
            name = match and match[1].replace("-", "_")
            if name not in old:
                spelled.append(word)
                continue
            value = match[2] if match[2] is not None or not words else words.pop(0)
            given = [] if value is None else [value]
            if old[name] is None:
                self._say_new(f"-{name}", "without effect")
            elif old[name] is MODEL:
                self._say_new(f"-{name}", "now MODEL, the first argument")
                model = given
            else:
                self._say_new(f"-{name}", f"now -{old[name]}")
                spelled.append("=".join([f"-{old[name]}", *given]))
        return [*model, *spelled]

    def _say_new(self, old: str, new: str) -> None:
        print(f"note: {old} of {self.prog} is {new}; see {self.prog} -h", file=sys.stderr)

    def error(self, message: str):
        """Print one message, without the usage, which can fill a screen, and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_flag(parser, name: str, help_text: str, **options) -> None:
    """Add the flag -NAME."""
    parser.add_argument(f"-{name}", help=help_text, **options)


def add_output_flags(
    parser, help_text: str, *, overwrite: str = "replace what -output names", **options
) -> None:
    """Add -output, and -overwrite, without which nothing is replaced."""
    add_flag(parser, "output", help_text, **options)
    add_flag(parser, "overwrite", overwrite, action="store_true")


def add_backend(parser) -> None:
    """Add -backend, for what runs a network alone."""
    text = "what runs the network (%(default)s: the fastest that is there, measured once)"
    add_flag(parser, "backend", text, default="auto", metavar="NAME")


def add_model(
    parser,
    help_text: str = MODEL_FORMS,
    *,
    weights: bool = True,
    is_optional: bool = False,
    default: str | None = None,
) -> None:
    """Add MODEL, the first argument, and -opts, which go over its configuration; where its weights
    are read, also -cfg, for those that carry no configuration."""
    nargs = "?" if is_optional or default is not None else None
    if default is not None:
        help_text += " (%(default)s)"
    parser.add_argument("model", metavar="MODEL", nargs=nargs, default=default, help=help_text)
    if weights:
        without = "needed for a checkpoint that does not carry its configuration"
        add_config_flags(parser, without)
    else:
        parser.set_defaults(cfg=None)
        add_opts(parser)


def add_config_flags(parser, without: str) -> None:
    """Add -cfg and -opts, which describe a network; `without` says when -cfg may be left out."""
    add_flag(parser, "cfg", f"YAML file of the network; {without}", metavar="FILE")
    add_opts(parser)


def add_opts(parser) -> None:
    add_flag(
        parser,
        "opts",
        "any other keys, e.g. -opts TRAIN.BASE_LR 1e-3 SEED 1",
        nargs="+",
        action="extend",
        metavar="KEY VALUE",
    )


def config_from(
    args: argparse.Namespace, checkpoint: str | None = None, *, reads_data: bool = False
):
    """Return the configuration of -cfg, or else of `checkpoint`, which is MODEL where a command has
    one, with the flags over it; MODEL.NUM_CLASSES may be None for what `reads_data`."""
    from replknet_paddle.checkpoints.run_folder import EXPORT_FILE_OF_0_2, config_of
    from replknet_paddle.config import check_class_count, get_config, is_yaml, update_config
    from replknet_paddle.runtime.files import find_path
    from replknet_paddle.zoo import config_of_published, is_published, no_model

    checkpoint = take_model(args) or checkpoint
    if checkpoint is not None and is_yaml(checkpoint):
        if args.cfg not in (None, checkpoint):
            raise InputError(f"MODEL {checkpoint} and -cfg {args.cfg}; allowed: one configuration")
        args.cfg, args.pretrained = checkpoint, None
    if args.cfg is not None:
        config = get_config(args.cfg)
    elif checkpoint is None:
        raise InputError(
            f"no MODEL; the first argument is a {MODEL_FORMS}"
            if hasattr(args, "model")
            else "no configuration; give one by -cfg, e.g. -cfg=configs/replknet_31b.yaml"
        )
    elif is_published(checkpoint):
        config = config_of_published(checkpoint)
    elif not os.path.exists(find_path(checkpoint)):
        raise FileNotFoundError(no_model(checkpoint))
    elif os.path.isfile(os.path.join(checkpoint, EXPORT_FILE_OF_0_2)):
        from replknet_paddle.deploy.export import read_export

        config = read_export(checkpoint).config
    else:
        config = config_of(checkpoint)
    config = update_config(config, args)
    if not reads_data:
        check_class_count(config)
    return config


def config_given(args: argparse.Namespace):
    """Return the configuration that -cfg and -opts give MODEL; None without both."""
    return None if args.cfg is None and args.opts is None else config_from(args)


def take_model(args: argparse.Namespace) -> str | None:
    """Return MODEL, and set -pretrained to it; None for a command that has none, or of an
    evaluation whose MODEL is -pretrained."""
    if getattr(args, "model", None) is None:
        return None
    if vars(args).get("pretrained") not in (None, args.model):
        raise InputError(
            f"MODEL {args.model} and -pretrained {args.pretrained}; allowed: one of them"
        )
    args.pretrained = args.model
    return args.model
