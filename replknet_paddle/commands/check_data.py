"""Read a whole data set and report all that is wrong with it.

Exit status: 0 if nothing is, 1 if something is, 2 if it could not be checked.
"""

import argparse
import json
import os
import sys

from tqdm import tqdm

from replknet_paddle.runtime.errors import InputError
from replknet_paddle.data.list_files import KINDS, check_data

SHOWN = 20  # problems on the console; the report has them all


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="replknet check-data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: replknet check-data /dataset/imagenet -num_classes 1000",
    )
    parser.add_argument("data_path", metavar="DIR", help="folder of train_list.txt, val_list.txt")
    parser.add_argument(
        "-num_classes",
        "--num_classes",
        type=int,
        metavar="N",
        help="labels must be below; default: the largest in train_list.txt, plus one, but no more "
        "than it has lines",
    )
    parser.add_argument(
        "-workers",
        "--workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="processes that decode; default %(default)s",
    )
    parser.add_argument(
        "-allow_outside",
        "--allow_outside",
        action="store_true",
        help="paths may lead out of DIR, as with DATA.ALLOW_OUTSIDE",
    )
    parser.add_argument(
        "-report", "--report", metavar="FILE", help="write everything found as JSON"
    )
    args = parser.parse_args(argv)
    try:
        for name in ("num_classes", "workers"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise InputError(f"-{name} is {getattr(args, name)}; allowed: at least 1")
        folder = os.path.dirname(args.report or "") or "."
        if not os.path.isdir(folder):  # known before hours of reading
            raise FileNotFoundError(f"no folder {folder} for -report {args.report}")
        report = check_data(
            args.data_path,
            num_classes=args.num_classes,
            allow_outside=args.allow_outside,
            workers=args.workers,
            progress=lambda found, total: tqdm(found, total=total, unit="file"),
        )
        if args.report:
            unfinished = f"{args.report}.unfinished"
            with open(unfinished, "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1)
            os.replace(unfinished, args.report)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print(report)
    return 1 if report["problems"] else 0


def _print(report: dict) -> None:
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
    print("wrong" if report["problems"] else "all right")


if __name__ == "__main__":
    sys.exit(main())
