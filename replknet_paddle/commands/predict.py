"""Classify pictures.

MODEL is an exported folder, a run folder or a checkpoint in one (output/RUN/best), or the name of
a published model. A folder stands for the images in and below it, in no particular order; a
pattern in quotes, such as 'photos/**/*.jpg', for the files that it matches.
"""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterable

from tqdm import tqdm

from replknet_paddle.deploy.images import ImageFiles
from replknet_paddle.deploy.pictures import annotate, check_new_folder, check_new_picture, grid, save
from replknet_paddle.deploy.predictor import BATCH_SIZE, Prediction, Predictor, predict_files, read_config
from replknet_paddle.deploy.results import check_results_file, results_file
from replknet_paddle.runtime.errors import InputError

PICTURE_HEIGHT = 480  # pixels, of the saved pictures
GRID_COLUMNS = 3
GRID_HEIGHT = 160  # pixels, of each picture in the grid
GRID_PICTURES = 12
NAMED_PROBLEMS = 10

EPILOG = """\
example: replknet predict output/RUN/best photos --out results.jsonl

exit status: 0 all were classified; 1 some were skipped, which are named at the end and in the
results; 2 bad input, or nothing that could be classified; 130 interrupted: the results so far are
in FILE.unfinished
"""


class Summary:
    """What is told at the end: how many were classified, and the first that were not."""

    def __init__(self):
        self.classified = 0
        self.skipped = 0
        self.problems = []

    def add(self, prediction: Prediction) -> None:
        if prediction.problem is None:
            self.classified += 1
            return
        self.skipped += 1
        if self.skipped <= NAMED_PROBLEMS:
            self.problems.append(f"{printable(prediction.path)}: {prediction.problem}")

    def text(self, other_files: int) -> str:
        lines = [f"classified {self.classified:,} images, skipped {self.skipped:,}"]
        if other_files:
            lines[0] += f", passed over {other_files:,} files that are not named as images are"
        lines += [f"  {problem}" for problem in self.problems]
        if self.skipped > len(self.problems):
            lines.append(f"  and {self.skipped - len(self.problems):,} more")
        return "\n".join(lines)


class Console:
    """A line a file on standard output."""

    def __init__(self, class_names):
        self.class_names = class_names

    def write(self, prediction: Prediction) -> None:
        said = prediction.problem
        if said is None:
            said = ", ".join(
                f"{printable(self.class_names[label])} {100 * score:.1f} %"
                for label, score in zip(prediction.labels, prediction.scores)
            )
        tqdm.write(f"{printable(prediction.path)}: {said}")


class Drawings:
    """Annotated pictures: each in a file of `folder`, and the first ones together in one file."""

    def __init__(self, class_names, folder: str | None, grid_file: str | None):
        self.class_names = class_names
        self.folder = folder
        self.grid_file = grid_file
        self.count = 0
        self.cells = []

    def add(self, prediction: Prediction) -> None:
        self.count += 1
        if self.folder is not None:
            os.makedirs(self.folder, exist_ok=True)
            # The number keeps apart what has one name in several folders.
            stem = os.path.splitext(os.path.basename(prediction.path))[0]
            name = f"{self.count:06d}_{stem[:50]}.jpg"
            save(self.draw(prediction, PICTURE_HEIGHT), os.path.join(self.folder, name))
        if self.grid_file is not None and len(self.cells) < GRID_PICTURES:
            self.cells.append(self.draw(prediction, GRID_HEIGHT))

    def draw(self, prediction: Prediction, height: int):
        folder, name = os.path.split(prediction.path)
        return annotate(
            prediction.picture,
            [self.class_names[label] for label in prediction.labels],
            prediction.scores,
            caption=printable(os.path.join(os.path.basename(folder), name)),
            height=height,
        )

    def finish(self) -> None:
        if self.cells:
            save(grid(self.cells, GRID_COLUMNS), self.grid_file)


@contextlib.contextmanager
def results_alone_on_stdout():
    """Send what libraries of C++ print to standard error, so that standard output has results."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # no file
        yield
        return
    sys.stdout.flush()
    stdout = sys.stdout
    with os.fdopen(os.dup(number), "w", encoding=stdout.encoding, errors=stdout.errors) as results:
        os.dup2(sys.stderr.fileno(), number)
        sys.stdout = results
        try:
            yield
            results.flush()
        finally:
            os.dup2(results.fileno(), number)
            sys.stdout = stdout


def printable(name: str) -> str:
    """The name of a file or class for a terminal, which it may hold commands for."""
    return name if name.isprintable() else ascii(name)


def predict(args) -> int:
    """Do what the flags say; the exit status."""
    for flag, value in (("--topk", args.topk), ("-batch_size", args.batch_size)):
        if value < 1:
            raise InputError(f"{flag} is {value}; allowed: an integer >= 1")
    files = ImageFiles(args.images, leave_out=args.save_pictures)
    if args.out is not None:
        check_results_file(args.out)
    if args.save_pictures is not None:
        check_new_folder(args.save_pictures)
    if args.save_grid is not None:
        check_new_picture(args.save_grid)
    config = read_config(args.model, args.cfg, args.opts)
    total = files.count()
    predictor = Predictor(args.model, backend=args.backend, config=config)
    topk = min(args.topk, predictor.num_classes)
    draws = args.save_pictures is not None or args.save_grid is not None
    predictions = predict_files(
        predictor,
        files,
        topk=topk,
        batch_size=args.batch_size,
        picture_pixels=2 * PICTURE_HEIGHT if draws else 0,
    )
    bar = tqdm(predictions, total=total, unit="images", disable=None)
    summary = Summary()
    drawings = (
        Drawings(predictor.class_names, args.save_pictures, args.save_grid) if draws else None
    )
    if args.out is None:
        write_all(bar, Console(predictor.class_names), drawings, summary)
    else:
        with results_file(args.out, predictor.class_names, topk) as results:
            write_all(bar, results, drawings, summary)
    if drawings is not None:
        drawings.finish()
    print(summary.text(files.other_files), file=sys.stderr)
    return 1 if summary.skipped else 0


def write_all(predictions: Iterable[Prediction], results, drawings, summary: Summary) -> None:
    for prediction in predictions:
        summary.add(prediction)
        results.write(prediction)
        if drawings is not None and prediction.problem is None:
            drawings.add(prediction)
    if summary.classified == 0:
        raise InputError("nothing could be classified:\n" + "\n".join(summary.problems))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="replknet predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or pattern")
    parser.add_argument(
        "--topk", type=int, default=5, metavar="K", help="classes to give (%(default)s)"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="results, as .jsonl or .csv by its name; without it they are printed",
    )
    parser.add_argument(
        "--save-pictures",
        metavar="DIR",
        help="new or empty folder for the pictures with their classes drawn beside",
    )
    parser.add_argument(
        "--save-grid",
        metavar="FILE",
        help=f"new .png or .jpg file for the first {GRID_PICTURES} of them in one",
    )
    parser.add_argument(
        "-backend",
        "--backend",
        default="auto",
        metavar="NAME",
        help="what runs the network (%(default)s: the fastest that is there)",
    )
    parser.add_argument(
        "-batch_size",
        "--batch_size",
        type=int,
        default=BATCH_SIZE,
        metavar="N",
        help="images at once (%(default)s)",
    )
    parser.add_argument(
        "-cfg",
        "--cfg",
        metavar="FILE",
        help="YAML file of a checkpoint; not needed for one in its run folder",
    )
    parser.add_argument(
        "-opts", "--opts", nargs="+", metavar="KEY VALUE", help="other keys of a checkpoint's"
    )
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="PIL")  # of pictures that it then reads all the same
    try:
        with results_alone_on_stdout():
            return predict(args)
    except BrokenPipeError:  # what reads the results has seen enough
        return 141
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        unfinished = f"{args.out}.unfinished"
        kept = f"; the results so far are in {unfinished}" if os.path.exists(unfinished) else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
