"""What each benchmark prints: medians with spread, both sides of a comparison in one run."""

import os
import statistics
import tempfile

import paddle
import PIL

from replknet_paddle.bench.conv import GRID, GRID_LAYERS, STAGES, ConvCase, time_conv
from replknet_paddle.bench.data import PLAIN, core_seconds, loader_seconds, make_photographs
from replknet_paddle.bench.inference import (
    chart_suffixes,
    draw_chart,
    machine,
    set_statistics,
    table,
    time_backends,
    write_json,
)
from replknet_paddle.bench.network import time_network, time_train_loop
from replknet_paddle.bench.timing import describe_machine, median_ratio, summarize
from replknet_paddle.checkpoints.run_folder import run_config_file
from replknet_paddle.config import get_config, update_config
from replknet_paddle.data.dataset import get_dataset
from replknet_paddle.data.lists import LIST_FILES
from replknet_paddle.data.loader import Loader
from replknet_paddle.data.samplers import TrainBatches
from replknet_paddle.deploy.backends import PACKAGES, installed_backends, load_network
from replknet_paddle.deploy.fold import random_images
from replknet_paddle.model import build_replknet
from replknet_paddle.ops import LibraryError, get_library
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import check_file_target


def train_loop(args) -> None:
    """Print what the training loop adds to forward, backward and optimizer step."""
    config = update_config(get_config(args.cfg), args)
    if min(args.steps, args.rounds) < 1:
        raise InputError(f"--steps {args.steps} --rounds {args.rounds}; allowed: integers >= 1")
    seconds = time_train_loop(config, steps=args.steps, rounds=args.rounds)
    print(describe_machine())
    print(f"{config.MODEL.NAME}, batch {config.DATA.BATCH_SIZE}, {args.steps} steps a run")
    for name, values in seconds.items():
        print(f"{name}: {summarize(values)} per step")
    ratio = median_ratio(seconds["loop"], seconds["bare"])
    print(f"the loop takes {ratio:.4f} of the bare step's time")


def data(args) -> None:
    """Print what a core does of the input pipeline beside plain decoding, and how loaders scale."""
    if args.rounds < 1 or args.workers < 0:
        raise InputError("allowed: --rounds at least 1, --workers at least 0")
    with tempfile.TemporaryDirectory() as folder:
        files = make_photographs(args.photographs, folder, 200)
        for name in LIST_FILES.values():
            with open(os.path.join(folder, name), "w", encoding="ascii") as file:
                file.writelines(f"{image} 0\n" for image in files)
        args.data_path = folder
        config = update_config(get_config(args.cfg), args)
        train, val = get_dataset(config, True), get_dataset(config, False)
        paths = [os.path.join(folder, name) for name in files]
        kilobytes = sum(map(os.path.getsize, paths)) / len(paths) / 1e3
        print(f"{describe_machine()}, Pillow {PIL.__version__}")
        print(
            f"{len(files)} photographs of 500x375 pixels, quality 90, {kilobytes:.0f} kB, to "
            f"{config.DATA.IMAGE_SIZE} pixels by {type(train.transform.px).__name__}"
        )
        seconds = core_seconds(paths, _data_jobs(train, val), rounds=args.rounds)
        print(f"{'one core':34}{'images/s':>9}{'quartiles':>14}{'of decoding':>14}")
        for name, values in seconds.items():
            low, median, high = (1 / q for q in _quartiles(values)[::-1])
            ratio = median_ratio(seconds[PLAIN], values)
            print(f"{name:34}{median:9.0f}{f'{low:.0f}..{high:.0f}':>14}{ratio:14.3f}")
        loaders = {
            workers: Loader(
                train,
                TrainBatches(len(train), 10, rank=0, world_size=1, seed=0),
                workers=workers,
                batch_bytes=30 * config.DATA.IMAGE_SIZE**2,
                finish=lambda pixels, erasures: pixels,  # as if the device were another
                max_bad_images=0,
            )
            for workers in sorted({1, args.workers} if args.workers else ())
        }
        seconds = loader_seconds(loaders, epochs=args.epochs)
        for workers, values in seconds.items():
            loaders[workers].close()
            print(
                f"{f'training loader, {workers} worker(s)':34}{1 / statistics.median(values):9.0f}"
                f"{median_ratio(seconds[1], values):28.2f} times one"
            )


def conv(args) -> None:
    """Print how fast depthwise convolutions are beside Paddle's, by pass and algorithm."""
    if min(args.rounds, args.batch) < 1:
        raise InputError(f"--rounds {args.rounds} --batch {args.batch}; allowed: integers >= 1")
    library = _library()
    print(describe_machine())
    peak = library.peak_gflops(library.threads)
    print(
        f"{library.isa}, {library.threads} thread(s) (LARGE_KERNEL_THREADS), measured peak "
        f"{peak:.0f} GFLOP/s; GFLOP/s of taps inside the map"
    )
    shapes = {"stages": STAGES, "grid": GRID, "all": (*STAGES, *GRID)}[args.shapes]
    print(
        f"{'shape':>20} {'pass':17}{'by':20}{'ms':>9}{'from':>9}{'to':>9}{'GFLOP/s':>9}"
        f"{'of peak':>9}{'Paddle/it':>11}{f'{GRID_LAYERS} layers':>11}"
    )
    for channels, side, kernel in shapes:
        case = ConvCase(args.batch, channels, side, kernel)
        for name, by_impl in time_conv(case, rounds=args.rounds).items():
            work = case.useful_flops * (2 if name == "both gradients" else 1)
            which = "forward" if name == "forward" else "gradients"
            chosen = library.choose(case.shape, which)
            for impl, seconds in by_impl.items():
                timing = summarize(seconds)
                rate = work / timing.median_seconds / 1e9
                print(
                    f"{f'{args.batch}x{channels}x{side}x{side} K{kernel}':>20} {name:17}"
                    f"{impl + (' (auto)' if impl == chosen else ''):20}"
                    f"{1e3 * timing.median_seconds:9.3f}{1e3 * timing.min_seconds:9.3f}"
                    f"{1e3 * timing.max_seconds:9.3f}{rate:9.1f}{rate / peak:9.2f}"
                    f"{median_ratio(by_impl['paddle'], seconds):11.1f}"
                    f"{f'{GRID_LAYERS * 1e3 * timing.median_seconds:.1f} ms':>11}",
                    flush=True,
                )


def network(args) -> None:
    """Print how fast a network is with and without the compiled operators, and where time goes."""
    config = update_config(get_config(args.cfg), args)
    if args.rounds < 1:
        raise InputError(f"--rounds {args.rounds}; allowed: an integer >= 1")
    library = _library()
    print(describe_machine())
    print(f"{library.isa}, {library.threads} thread(s) (LARGE_KERNEL_THREADS)")
    for what, seconds, parts in time_network(
        config, forward_batch=args.forward_batch, step_batch=args.step_batch, rounds=args.rounds
    ):
        for impl, values in seconds.items():
            ratio = median_ratio(seconds["Paddle's own"], values)
            print(f"{what}, {impl}: {summarize(values)}, Paddle's own/it {ratio:.2f}")
        print(f"{what}, by parts, with the operators:")
        for part, value in sorted(parts.items(), key=lambda item: -item[1]):
            print(f"    {part:36}{1e3 * value:9.1f} ms", flush=True)


def _library():
    try:
        return get_library()
    except LibraryError as error:
        raise InputError(f"nothing to measure: {error}") from None


def _data_jobs(train, val) -> dict:
    return {
        "evaluation, 8 bits": lambda _, i: val.read(0, i, val.transform.unfinished),
        "evaluation, normalized": lambda _, i: val.read(0, i, val.transform),
        "training, 8 bits": lambda n, i: train.read(n, i, train.transform.unfinished),
        "training, normalized and erased": lambda n, i: train.read(n, i, train.transform),
    }


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3


def inference(args) -> None:
    """Print how fast each installed backend runs a network, in each precision and batch size."""
    if args.cfg is None and args.pretrained is None:
        raise InputError(
            "nothing to measure; name a network by -cfg or a checkpoint by -pretrained"
        )
    config = update_config(get_config(args.cfg or run_config_file(args.pretrained)), args)
    if config.MODEL.OUT_INDICES is not None:
        raise InputError(
            f"MODEL.OUT_INDICES is {config.MODEL.OUT_INDICES}, which makes a backbone without a "
            "head; allowed: None"
        )
    if min(args.rounds, *args.batch_sizes) < 1 or (args.threads is not None and args.threads < 1):
        raise InputError("--rounds, --batch_sizes, --threads; allowed: integers >= 1")
    args.backends = args.backends or installed_backends()
    unknown = sorted(set(args.backends) - set(PACKAGES))
    if unknown:
        raise InputError(f"--backends {' '.join(unknown)}; allowed: {' '.join(PACKAGES)}")
    if args.json:
        check_file_target(args.json, [".json"])
    if args.chart:
        check_file_target(args.chart, chart_suffixes())
    size = config.DATA.IMAGE_SIZE
    if args.pretrained:
        model, _ = load_network(args.pretrained, config)
    else:
        paddle.seed(config.SEED)
        model = build_replknet(config)
        set_statistics(model, random_images(max(4, 2 * (256 // size) ** 2), size))
    print(machine())
    weights = args.pretrained or "random weights"
    title = f"{config.MODEL.NAME}, {size} x {size} pixels, {weights}"
    print(f"{title}, {args.threads or 'all'} threads")
    rows = time_backends(
        model,
        config,
        backends=args.backends,
        batch_sizes=args.batch_sizes,
        threads=args.threads,
        rounds=args.rounds,
        report=print,
    )
    print(table(rows))
    if args.json:
        write_json(args.json, rows, machine=machine(), network=title, threads=args.threads)
    if args.chart:
        draw_chart(args.chart, rows, f"{title}\n{machine()}")
