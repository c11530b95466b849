"""Pictures of one's own: `replknet predict`, with its lines and summary, `embed` and `page`."""

import contextlib
import logging
import os
import signal
import sys
import warnings
from dataclasses import replace
from functools import partial

from replknet_paddle.commands.flags import (
    add_backend,
    add_flag,
    add_model,
    add_output_flags,
    config_from,
    config_given,
)
from replknet_paddle.runtime.errors import InputError, counted
from replknet_paddle.runtime.files import (
    PARTIAL_SUFFIX,
    check_file_target,
    check_new_folder,
    find_path,
)
from replknet_paddle.runtime.progress import Bar, print_above
from replknet_paddle.runtime.terminal import Terminal, printable

NAMED_PROBLEMS = 10


def add_predict_flags(parser) -> None:
    add_model(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder, pattern or list")
    add_output_flags(
        parser,
        "results, as .jsonl or .csv by its name; without it they are printed",
        overwrite="replace what the flags for files and folders name",
        metavar="FILE",
    )
    add_flag(
        parser,
        "save_pictures",
        "new or empty folder for the pictures with their classes drawn beside",
        metavar="DIR",
    )
    add_flag(
        parser,
        "save_heat_maps",
        "the same with heat maps of where the network looks; on backend eager alone",
        metavar="DIR",
    )
    add_flag(
        parser,
        "save_grid",
        "new .png or .jpg file for the first 12 of them in one",
        metavar="FILE",
    )
    add_flag(parser, "topk", "classes to give (%(default)s)", type=int, default=5, metavar="K")
    text = "mark pictures as rejected whose first class has a probability below P"
    add_flag(parser, "reject", text, type=float, metavar="P")
    text = "flip: average the probabilities of each picture and its mirror image"
    add_flag(parser, "tta", text, choices=("flip",))
    add_flag(
        parser,
        "every",
        "between the frames of films; 0: all frames (%(default)s)",
        type=float,
        default=1.0,
        metavar="SECONDS",
    )
    add_backend(parser)
    add_flag(parser, "batch_size", "images at once (%(default)s)", type=int, default=8, metavar="N")


class Summary:
    """Counts what was classified, and keeps the first problems, for the report at the end."""

    def __init__(self, reject: float | None = None):
        self.reject, self.rejected = reject, 0
        self.classified = 0
        self.skipped = 0
        self.right = 0
        self.with_truth = 0
        self.problems = []

    def add(self, prediction) -> None:
        if prediction.problem is None:
            self.classified += 1
            self.rejected += bool(prediction.rejected)
            is_right = None if prediction.rejected else prediction.is_right
            self.with_truth += is_right is not None
            self.right += bool(is_right)
            return
        self.skipped += 1
        if self.skipped <= NAMED_PROBLEMS:
            self.problems.append(f"{printable(prediction.path)}: {prediction.problem}")

    def text(self, passed_over: str, *, has_lists: bool, verb: str = "classified") -> str:
        lines = [f"{verb} {counted(self.classified, 'image')}, skipped {self.skipped:,}"]
        if self.reject is not None:
            lines[0] += f", rejected {self.rejected:,} below {100 * self.reject:g} %"
        if passed_over:
            lines[0] += f", {passed_over}"
        if self.with_truth:
            accepted = "" if self.reject is None else "accepted "
            where = "in folders named as classes"
            where = "whose class the list or the folder names" if has_lists else where
            share = f"{100 * self.right / self.with_truth:.2f} %"
            lines.append(
                f"right: {self.right:,} of {self.with_truth:,} {accepted}{where} ({share})"
            )
        lines += [f"  {problem}" for problem in self.problems]
        if self.skipped > len(self.problems):
            lines.append(f"  and {self.skipped - len(self.problems):,} more")
        return "\n".join(lines)


def run_predict(args) -> int:
    """Classify pictures and films.

    A folder stands for the images in and below it, in sorted order; a pattern in quotes, such as
    'photos/**/*.jpg', for the files that it matches. A film (film.mp4) stands for a frame a second.
    A list (val_list.txt), with lines "path label", stands for its images, and gives their classes.

    example: replknet predict output/RUN photos -output results.jsonl -save_pictures drawn

    exit status: 0 all were classified; 1 some were skipped, which are named at the end and in the
    results; 2 bad input, or nothing that could be classified; 130 interrupted: the results so far
    are in FILE.unfinished
    """
    warnings.filterwarnings("ignore", module="PIL")  # of pictures that it then reads all the same
    try:
        with results_alone_on_stdout():
            return predict(args)
    except KeyboardInterrupt:
        unfinished = f"{args.output}{PARTIAL_SUFFIX}"
        kept = f"; the results so far are in {unfinished}" if os.path.exists(unfinished) else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return 130


def predict(args) -> int:
    """Classify the files; return the exit status."""
    from replknet_paddle.data.make_lists import say_passed_over
    from replknet_paddle.deploy.drawing import PICTURE_FORMATS, PICTURE_HEIGHT, Drawings
    from replknet_paddle.deploy.export import is_export
    from replknet_paddle.deploy.gradcam import LAST_STRIDE
    from replknet_paddle.deploy.images import ImageFiles
    from replknet_paddle.deploy.predict import (
        RESULTS_SUFFIXES,
        Predictor,
        predict_files,
        results_file,
    )

    for flag, value in (("-topk", args.topk), ("-batch_size", args.batch_size)):
        if value < 1:
            raise InputError(f"{flag} is {value}; allowed: an integer >= 1")
    if args.reject is not None and not 0 < args.reject <= 1:
        raise InputError(f"-reject is {args.reject}; allowed: a probability above 0, at most 1")
    if not 0 <= args.every < float("inf"):
        raise InputError(f"-every is {args.every}; allowed: a number of seconds >= 0")
    has_maps = args.save_heat_maps is not None
    if has_maps and (args.backend not in ("auto", "eager") or is_export(find_path(args.model))):
        raise InputError(
            f"-save_heat_maps of {args.model} on backend {args.backend}; allowed: of a checkpoint, "
            "run folder or published model on eager (an export gives outputs alone)"
        )
    folders = [path for path in (args.save_pictures, args.save_heat_maps) if path is not None]
    if len(set(map(os.path.realpath, folders))) < len(folders):
        raise InputError(f"-save_pictures and -save_heat_maps {folders[0]}; allowed: two folders")
    files = ImageFiles(args.images, leave_out=folders, frame_seconds=args.every, reads_lists=True)
    is_new = not args.overwrite
    if args.output is not None:
        check_file_target(args.output, RESULTS_SUFFIXES, must_be_new=is_new)
    for folder in folders:
        check_new_folder(folder, is_kept=args.overwrite)
    if args.save_grid is not None:
        check_file_target(args.save_grid, tuple(PICTURE_FORMATS), must_be_new=is_new)
        if os.path.exists(args.save_grid):
            as_files = ImageFiles(args.images, reads_lists=True)  # films, too
            check_is_no_image(args.save_grid, as_files)
    config = config_given(args)
    args.model = find_path(args.model)
    total = files.count()
    options = dict(config=config, batch_size=args.batch_size, flip=args.tta == "flip")
    backend = "eager" if has_maps else args.backend
    predictor = Predictor(args.model, backend=backend, **options)
    label, path = files.highest
    if label >= predictor.num_classes:
        raise InputError(
            f"{path} has the label {label} in its list; allowed with {args.model}: labels below "
            f"{predictor.num_classes}, its number of classes"
        )
    names, topk = predictor.class_names, min(args.topk, predictor.num_classes)
    if has_maps and predictor.transform.image_size <= LAST_STRIDE:
        raise InputError(
            f"-save_heat_maps of a network for {predictor.transform.image_size} pixels, whose map "
            f"has a single position; allowed: for more than {LAST_STRIDE}"
        )
    drawings = Drawings(names, args.save_pictures, args.save_grid)
    heat_maps = Drawings(names, args.save_heat_maps, None)
    predictions = predict_files(
        predictor,
        files,
        topk=topk,
        batch_size=args.batch_size,
        picture_pixels=2 * PICTURE_HEIGHT if folders or args.save_grid else 0,
        heat_maps=has_maps,
        reject=args.reject,
    )
    summary = Summary(args.reject)
    rejects = args.reject is not None
    with contextlib.ExitStack() as stack:
        write = partial(print_prediction, names)
        if args.output is not None:
            write = stack.enter_context(results_file(args.output, names, topk, rejects=rejects))
        bar = stack.enter_context(Bar("prediction", total=total, unit="images"))
        for done, prediction in enumerate(predictions, start=1):
            summary.add(prediction)
            bar.show(done)
            write(prediction)
            if prediction.picture is not None:
                drawings.add(replace(prediction, heat=None))
                heat_maps.add(prediction)
        if summary.classified == 0:
            raise InputError("nothing could be classified:\n" + "\n".join(summary.problems))
    drawings.finish()
    has_lists = any(map(files.is_list, args.images))
    print(summary.text(say_passed_over(files.passed_over), has_lists=has_lists), file=sys.stderr)
    written = [path for path in (args.output, *folders, args.save_grid) if path]
    if written:
        print(f"wrote {', '.join(map(printable, written))}", file=sys.stderr)
    return 1 if summary.skipped else 0


def check_is_no_image(target: str, files) -> None:
    """Raise InputError where a picture would be written over one of those to classify."""
    for path, *_ in files:
        if os.path.exists(path) and os.path.samefile(path, target):
            raise InputError(f"{target} is one of the images; name another file")


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
        sys.stdout = Terminal(results)
        try:
            yield
            results.flush()
        finally:
            os.dup2(results.fileno(), number)
            sys.stdout = stdout


def print_prediction(class_names, prediction) -> None:
    """Print a line on standard output."""
    said = prediction.problem
    if said is None:
        said = ", ".join(
            f"{printable(class_names[label])} {100 * score:.1f} %"
            for label, score in zip(prediction.labels, prediction.scores)
        )
    mark = "rejected: " if prediction.rejected else ""
    print_above(f"{printable(prediction.path)}: {mark}{said}")


# ---- features


def add_embed_flags(parser) -> None:
    add_model(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder, pattern or list")
    text = ".npy file to write; beside it goes a .csv file, with the path and label of each row"
    add_output_flags(parser, text, overwrite="replace both files", metavar="FILE", required=True)
    add_backend(parser)
    add_flag(parser, "batch_size", "images at once (%(default)s)", type=int, default=8, metavar="N")


def run_embed(args) -> int:
    """Write the features of pictures, a row for each.

    They are what the network's head gets, in float32. The label of a picture is its number in a
    list (val_list.txt), or else the name of its folder.

    example: replknet embed output/RUN photos -output photos.npy

    exit status: 0 all were read; 1 some were skipped, which are named at the end; 2 bad input
    """
    warnings.filterwarnings("ignore", module="PIL")  # of pictures that it then reads all the same

    import numpy as np

    from replknet_paddle.analysis.probe import save_features
    from replknet_paddle.config import override
    from replknet_paddle.data.make_lists import say_passed_over
    from replknet_paddle.deploy.export import is_export
    from replknet_paddle.deploy.images import ImageFiles
    from replknet_paddle.deploy.predict import Predictor, predict_files

    if args.batch_size < 1:
        raise InputError(f"-batch_size is {args.batch_size}; allowed: an integer >= 1")
    check_file_target(args.output, (".npy",), must_be_new=not args.overwrite)
    table = os.path.splitext(args.output)[0] + ".csv"
    check_file_target(table, must_be_new=not args.overwrite)
    files, summary = ImageFiles(args.images, reads_lists=True), Summary()
    total, model = files.count(), find_path(args.model)
    if is_export(model):
        config = config_given(args)
    else:
        config = config_from(args, reads_data=True)
        if config.MODEL.TYPE == "RepLKNet":
            config = override(config, MODEL__NUM_CLASSES=0, MODEL__OUT_INDICES=None)
    options = dict(config=config, batch_size=args.batch_size, has_head=False)
    predictor = Predictor(model, backend=args.backend, **options)
    rows, features = [], []
    with Bar("features", total=total, unit="images") as bar:
        found = predict_files(predictor, files, topk=0, batch_size=args.batch_size)
        for done, picture in enumerate(found, start=1):
            summary.add(picture)
            bar.show(done)
            if picture.problem is None:
                folder = os.path.basename(os.path.dirname(os.path.abspath(picture.path)))
                rows.append((picture.path, folder if picture.truth is None else picture.truth))
                features.append(picture.features)
    if not features:
        raise InputError("nothing could be embedded:\n" + "\n".join(summary.problems))
    save_features(args.output, np.stack(features), rows)
    passed_over = say_passed_over(files.passed_over)
    print(summary.text(passed_over, has_lists=False, verb="embedded"), file=sys.stderr)
    print(f"wrote {printable(args.output)}, {printable(table)}", file=sys.stderr)
    return 1 if summary.skipped else 0


# ---- the page


def add_page_flags(parser) -> None:
    add_model(parser)
    add_flag(parser, "port", "of 127.0.0.1 (%(default)s)", type=int, default=7860, metavar="N")


def run_page(args) -> int:
    """Serve a page on this machine that classifies pictures.

    An export folder gives no heat map.

    example: replknet page output/RUN
    """
    if not 1 <= args.port <= 65535:
        raise InputError(f"-port is {args.port}; allowed: an integer from 1 to 65535")

    from replknet_paddle.deploy.export import is_export
    from replknet_paddle.deploy.page import build_page, import_gradio, reserve_port, serve
    from replknet_paddle.deploy.predict import Predictor

    config = config_given(args)
    args.model = find_path(args.model)
    listener = reserve_port(args.port)  # before the model, which takes longer

    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio calling itself
    import_gradio()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which removes the uploads
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as `nohup` has it
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    backend = "auto" if is_export(args.model) else "eager"  # which has the network, for heat maps
    predictor = Predictor(args.model, backend=backend, config=config)
    serve(build_page(args.model, predictor), listener)
    return 0
