"""Read a whole dataset and report everything that is wrong with it.

Exit status: 0 if nothing is, 1 if something is, 2 if it could not be checked.
"""

import json
import sys

from replknet_paddle.commands.flags import add_flag
from replknet_paddle.runtime.cores import available_cores
from replknet_paddle.runtime.errors import InputError, SystemFault
from replknet_paddle.runtime.files import check_file_target, written_whole

SHOWN = 20  # problems on the console; the report has them all

EXAMPLES = "example: replknet check-data /dataset/imagenet -num_classes 1000"


def add_arguments(parser) -> None:
    parser.add_argument("data_path", metavar="DIR", help="folder of train_list.txt, val_list.txt")
    add_flag(
        parser,
        "num_classes",
        "labels must be below N; default: the largest in train_list.txt, plus one, but no more "
        "than it has lines",
        type=int,
        metavar="N",
    )
    add_flag(
        parser,
        "workers",
        "processes that decode (%(default)s)",
        type=int,
        default=available_cores(),
        metavar="N",
    )
    add_flag(
        parser,
        "allow_outside",
        "paths may lead out of DIR, as with DATA.ALLOW_OUTSIDE",
        action="store_true",
    )
    add_flag(parser, "report", "write everything found as JSON", metavar="FILE")


def run(args) -> int:
    from tqdm import tqdm

    from replknet_paddle.data.check_data import check_data

    for name in ("num_classes", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"-{name} is {getattr(args, name)}; allowed: at least 1")
    if args.report:
        check_file_target(args.report)  # before hours of reading
    try:
        report = check_data(
            args.data_path,
            num_classes=args.num_classes,
            allow_outside=args.allow_outside,
            workers=args.workers,
            progress=lambda found, total: tqdm(found, total=total, unit="file"),
        )
    except SystemFault as error:
        print(f"error: {error}", file=sys.stderr)
        return 2  # 1 is for problems of the data
    if args.report:
        with written_whole(args.report) as file:
            json.dump(report, file, indent=1)
    _print(report)
    return 1 if report["problems"] else 0


def _print(report: dict) -> None:
    from replknet_paddle.data.check_data import KINDS

    for name, part in report["lists"].items():
        counts = part["images_per_class"]
        print(
            f"{name}: {part['images']} images of {len(counts)} classes, "
            f"{min(counts)} to {max(counts)} of each"
        )
    for problem in report["problems"][:SHOWN]:
        print(
            f"{problem['list']}, line {problem['line']}: {problem['kind']}: {problem['path']}: "
            f"{problem['message']}"
        )
    if len(report["problems"]) > SHOWN:
        print(f"and {len(report['problems']) - SHOWN} more")
    for kind, count in report["counts"].items():
        if count:
            print(f"{count:8} {KINDS[kind]}")
    found = sum(report["counts"].values())
    print(f"Problems found: {found}" if found else "No problems found")
