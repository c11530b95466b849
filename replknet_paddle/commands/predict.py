"""Classify pictures.

MODEL is an exported folder, a run folder or a checkpoint in one (output/RUN/best), or the name of
a published model. A folder stands for the images in and below it, in no particular order; a
pattern in quotes, such as 'photos/**/*.jpg', for the files that it matches.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterable

from tqdm import tqdm

from replknet_paddle.commands.flags import add_config_flags, add_flag
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import PARTIAL_SUFFIX, check_file_target, check_new_folder

PICTURE_HEIGHT = 480  # pixels, of the saved pictures
GRID_COLUMNS = 3
GRID_HEIGHT = 160  # pixels, of each picture in the grid
GRID_PICTURES = 12
NAMED_PROBLEMS = 10

EXAMPLES = """\
example: replknet predict output/RUN/best photos --out results.jsonl

exit status: 0 all were classified; 1 some were skipped, which are named at the end and in the
results; 2 bad input, or nothing that could be classified; 130 interrupted: the results so far are
in FILE.unfinished
"""


def add_arguments(parser) -> None:
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
    add_flag(
        parser,
        "backend",
        "what runs the network (%(default)s: the fastest that is there)",
        default="auto",
        metavar="NAME",
    )
    add_flag(parser, "batch_size", "images at once (%(default)s)", type=int, default=8, metavar="N")
    add_config_flags(parser)


class Summary:
    """What is reported at the end: how many were classified, and the first that were not."""

    def __init__(self):
        self.classified = 0
        self.skipped = 0
        self.problems = []

    def add(self, prediction) -> None:
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

    def write(self, prediction) -> None:
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
        from replknet_paddle.deploy.pictures import annotate, grid, save

        self.annotate, self.grid, self.save = annotate, grid, save

    def add(self, prediction) -> None:
        self.count += 1
        if self.folder is not None:
            os.makedirs(self.folder, exist_ok=True)
            # The number keeps apart what has one name in several folders.
            stem = os.path.splitext(os.path.basename(prediction.path))[0]
            name = f"{self.count:06d}_{stem[:50]}.jpg"
            self.save(self.draw(prediction, PICTURE_HEIGHT), os.path.join(self.folder, name))
        if self.grid_file is not None and len(self.cells) < GRID_PICTURES:
            self.cells.append(self.draw(prediction, GRID_HEIGHT))

    def draw(self, prediction, height: int):
        folder, name = os.path.split(prediction.path)
        return self.annotate(
            prediction.picture,
            [self.class_names[label] for label in prediction.labels],
            prediction.scores,
            caption=printable(os.path.join(os.path.basename(folder), name)),
            height=height,
        )

    def finish(self) -> None:
        if self.cells:
            self.save(self.grid(self.cells, GRID_COLUMNS), self.grid_file)


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


def run(args) -> int:
    warnings.filterwarnings("ignore", module="PIL")  # of pictures that it then reads all the same
    try:
        with results_alone_on_stdout():
            return predict(args)
    except KeyboardInterrupt:
        unfinished = f"{args.out}{PARTIAL_SUFFIX}"
        kept = f"; the results so far are in {unfinished}" if os.path.exists(unfinished) else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return 130


def predict(args) -> int:
    """Classify the files; the exit status."""
    from replknet_paddle.deploy.images import ImageFiles
    from replknet_paddle.deploy.pictures import PICTURE_FORMATS
    from replknet_paddle.deploy.predictor import Predictor, predict_files, read_config
    from replknet_paddle.deploy.results import SUFFIXES, results_file

    for flag, value in (("--topk", args.topk), ("-batch_size", args.batch_size)):
        if value < 1:
            raise InputError(f"{flag} is {value}; allowed: an integer >= 1")
    files = ImageFiles(args.images, leave_out=args.save_pictures)
    if args.out is not None:
        check_file_target(args.out, SUFFIXES)
    if args.save_pictures is not None:
        check_new_folder(args.save_pictures)
    if args.save_grid is not None:
        check_file_target(args.save_grid, tuple(PICTURE_FORMATS), must_be_new=True)
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


def write_all(predictions: Iterable, results, drawings, summary: Summary) -> None:
    for prediction in predictions:
        summary.add(prediction)
        results.write(prediction)
        if drawings is not None and prediction.problem is None:
            drawings.add(prediction)
    if summary.classified == 0:
        raise InputError("nothing could be classified:\n" + "\n".join(summary.problems))
