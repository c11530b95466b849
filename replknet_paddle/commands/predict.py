"""`replknet predict`: the flags, the lines that it prints, and its summary."""

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from replknet_paddle.commands.flags import add_config_flags, add_flag
from replknet_paddle.data.lists import printable
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import (
    PARTIAL_SUFFIX,
    check_file_target,
    check_new_folder,
    find_path,
)

NAMED_PROBLEMS = 10


def add_predict_flags(parser) -> None:
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
        help="new .png or .jpg file for the first 12 of them in one",
    )
    parser.add_argument(
        "--every",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="between the frames of films and webcams; 0: all frames (%(default)s)",
    )
    add_flag(
        parser,
        "backend",
        "what runs the network (%(default)s: the fastest that is there, measured once)",
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
        self.right = 0
        self.with_truth = 0
        self.problems = []

    def add(self, prediction) -> None:
        if prediction.problem is None:
            self.classified += 1
            self.with_truth += prediction.is_right is not None
            self.right += bool(prediction.is_right)
            return
        self.skipped += 1
        if self.skipped <= NAMED_PROBLEMS:
            self.problems.append(f"{printable(prediction.path)}: {prediction.problem}")

    def text(self, other_files: int) -> str:
        lines = [f"classified {self.classified:,} images, skipped {self.skipped:,}"]
        if other_files:
            lines[0] += f", passed over {other_files:,} files that are not named as images are"
        if self.with_truth:
            lines.append(
                f"right: {self.right:,} of {self.with_truth:,} in folders named as classes "
                f"({100 * self.right / self.with_truth:.2f} %)"
            )
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


def run_predict(args) -> int:
    """Classify pictures, films and what a webcam sees.

    MODEL is an exported folder, a run folder or a checkpoint in one (output/RUN/best), or the name
    of a published model. A folder stands for the images in and below it, in sorted order; a pattern
    in quotes, such as 'photos/**/*.jpg', for the files that it matches. A film (film.mp4) stands
    for a frame a second; `webcam` for what it sees until Ctrl-C, and `webcam:1` for the second one.

    examples: replknet predict output/RUN/best photos --out results.jsonl
              replknet predict output/RUN/best film.mp4 --every 0.5 --save-pictures frames

    exit status: 0 all were classified; 1 some were skipped, which are named at the end and in the
    results; 2 bad input, or nothing that could be classified; 130 interrupted: the results so far
    are in FILE.unfinished
    """
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
    from replknet_paddle.deploy.drawings import PICTURE_HEIGHT, Drawings
    from replknet_paddle.deploy.images import ImageFiles
    from replknet_paddle.deploy.pictures import PICTURE_FORMATS
    from replknet_paddle.deploy.predictor import Predictor, predict_files, read_config
    from replknet_paddle.deploy.results import SUFFIXES, results_file

    for flag, value in (("--topk", args.topk), ("-batch_size", args.batch_size)):
        if value < 1:
            raise InputError(f"{flag} is {value}; allowed: an integer >= 1")
    if not 0 <= args.every < float("inf"):
        raise InputError(f"--every is {args.every}; allowed: a number of seconds >= 0")
    args.model = find_path(args.model)
    files = ImageFiles(args.images, leave_out=args.save_pictures, frame_seconds=args.every)
    if args.out is not None:
        check_file_target(args.out, SUFFIXES)
    if args.save_pictures is not None:
        check_new_folder(args.save_pictures)
    if args.save_grid is not None:
        check_file_target(args.save_grid, tuple(PICTURE_FORMATS), must_be_new=True)
    config = read_config(args.model, args.cfg, args.opts)
    total = files.count()
    batch_size = 1 if files.is_live else args.batch_size
    predictor = Predictor(args.model, backend=args.backend, config=config, batch_size=batch_size)
    topk = min(args.topk, predictor.num_classes)
    draws = args.save_pictures is not None or args.save_grid is not None
    predictions = predict_files(
        predictor,
        until_interrupted(files) if files.is_live else files,
        topk=topk,
        batch_size=batch_size,
        picture_pixels=2 * PICTURE_HEIGHT if draws else 0,
        is_live=files.is_live,
    )
    bar = tqdm(predictions, total=None if files.is_live else total, unit="images", disable=None)
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


def until_interrupted(items: Iterable) -> Iterator:
    """Yield `items` until Ctrl-C, which then is the way to end them."""
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        for item in items:
            if interrupted.is_set():
                return
            yield item
    finally:
        signal.signal(signal.SIGINT, before)


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


def write_all(predictions: Iterable, results, drawings, summary: Summary) -> None:
    for prediction in predictions:
        summary.add(prediction)
        results.write(prediction)
        if drawings is not None and prediction.problem is None:
            drawings.add(prediction)
    if summary.classified == 0:
        raise InputError("nothing could be classified:\n" + "\n".join(summary.problems))
