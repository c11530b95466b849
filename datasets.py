"""ImageNet in list files, or anything else in that layout, and the loaders over it.

    DATA_PATH/train_list.txt    one image a line: path relative to DATA_PATH, white space, label
    DATA_PATH/val_list.txt

The label is what follows the last white space, so paths may hold spaces. Training samples are
named by (epoch, index), and all that is random in one depends on nothing but the seed and that
name: neither the number of workers nor a restart changes what the network sees.
"""

import functools
import os
from collections.abc import Callable, Iterator

import numpy as np
import paddle
from PIL import Image

from errors import InputError
from transforms import build_eval_transform, build_train_transform

LAYOUT = ('-data_path takes a folder with train_list.txt and val_list.txt, whose lines are the path of '
          'an image below that folder, a space and the number of its class, e.g. '
          '"train/n01440764/n01440764_10026.JPEG 0"')
LIST_FILES = {True: 'train_list.txt', False: 'val_list.txt'}


class ListDataset(paddle.io.Dataset):
    """The images of a list file.

    Args:
        list_file: path of the list.
        root: folder that the list's paths are relative to, and that no image may lie outside of.
        transform: (PIL image, random generator) -> float32 array (3, H, W).
        num_classes: labels must be in [0, num_classes).
        seed: of the random generators.

    Raises:
        FileNotFoundError: no such folder or list.
        InputError: a line that cannot be right; the message has the file and the line number.
    """

    def __init__(self, list_file: str, root: str, transform: Callable, *, num_classes: int,
                 seed: int = 0):
        super().__init__()
        if not os.path.isdir(root):
            raise FileNotFoundError(f'no data folder {root}; {LAYOUT}')
        if not os.path.isfile(list_file):
            raise FileNotFoundError(f'no list file {list_file}; {LAYOUT}')
        self.list_file = list_file
        self.root = root
        self.transform = transform
        self.seed = seed
        # Bytes and arrays rather than lists of str: reading a list's items writes to their
        # reference counts, and that copies the whole list into every worker process.
        self._paths, self._ends, self._lines, self.labels = read_list(list_file, num_classes)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """The path of image `index`, relative to the data folder."""
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._paths[start:self._ends[index]])

    def __getitem__(self, sample: tuple[int, int]) -> tuple[np.ndarray, np.int64]:
        """The image (3, H, W) and label of sample (epoch, index)."""
        epoch, index = sample
        path = self.path(index)
        try:
            with Image.open(self._resolve(path)) as image:
                pixels = self.transform(image, np.random.default_rng((self.seed, epoch, index)))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            # Pillow's errors for broken files; SyntaxError is what its PNG reader raises.
            reason = 'no such file' if isinstance(error, FileNotFoundError) else str(error)
            raise SampleError(f'{self.list_file}, line {self._lines[index]}: cannot read image '
                              f'{path}: {reason}') from None
        return pixels, self.labels[index]

    def _resolve(self, path: str) -> str:
        """The absolute path of an image, which must not lie outside the data folder."""
        folder, name = os.path.split(path)
        full = os.path.join(_real_folder(self.root, folder), name)
        if os.path.islink(full):
            full = os.path.realpath(full)
            _check_inside(full, self.root)
        return full


class SampleError(InputError):
    """An image that cannot be read.

    A loader raises it anew with the worker's traceback as its text: only the last line, the
    message itself, is kept.
    """

    def __init__(self, message: str):
        super().__init__(message.strip().splitlines()[-1].removeprefix('datasets.SampleError: '))


@functools.lru_cache(maxsize=65536)  # ImageNet-22K has 21,841 folders
def _real_folder(root: str, folder: str) -> str:
    real = os.path.realpath(os.path.join(root, folder))
    _check_inside(real, root)
    return real


def _check_inside(real: str, root: str) -> None:
    real_root = os.path.realpath(root)
    if os.path.commonpath([real, real_root]) != real_root:
        raise ValueError(f'it leads to {real}, outside the data folder')


def read_list(list_file: str, num_classes: int):
    """Parse a list file.

    Returns:
        All paths as one bytes object, the end of each path in it, the line number of each image
        (counted from 1; blank lines count), and the labels: int64 arrays (number of images,).

    Raises:
        InputError: the first lines that cannot be right, up to ten, with their numbers.
    """
    paths, ends, lines, labels, problems = [], [], [], [], []
    end = 0
    with open(list_file, 'rb') as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b'\xef\xbb\xbf')
            if not line.strip():
                continue
            path, label, problem = _parse_line(line, num_classes)
            if problem:
                problems.append(f'{list_file}, line {number}: {problem}')
                if len(problems) == 10:
                    break
                continue
            paths.append(path)
            end += len(path)
            ends.append(end)
            lines.append(number)
            labels.append(label)
    if problems:
        raise InputError('\n'.join(problems))
    if not paths:
        raise InputError(f'{list_file} lists no image')
    return (b''.join(paths), np.array(ends, dtype='int64'), np.array(lines, dtype='int64'),
            np.array(labels, dtype='int64'))


def _parse_line(line: bytes, num_classes: int) -> tuple[bytes, int, str | None]:
    """Path, label, and what is wrong with the line, if anything."""
    shown = line.decode('utf-8', 'replace').strip()[:200]
    parts = line.strip().rsplit(None, 1)
    if len(parts) < 2:
        return b'', 0, f'expected a path and a label, got {shown!r}'
    path, text = parts
    try:
        label = int(text)
    except ValueError:
        return b'', 0, f'no label after the path: {shown!r} ends with {text.decode("utf-8", "replace")!r}'
    if not 0 <= label < num_classes:
        return b'', 0, (f'label {label} is outside [0, {num_classes}); '
                        'MODEL.NUM_CLASSES sets the number of classes')
    if b'\0' in path or path.startswith(b'/') or b'..' in path.split(b'/'):
        return b'', 0, f'path {shown!r} must be relative and stay inside the data folder'
    return path, label, None


class TrainBatches(paddle.io.Sampler):
    """The (epoch, index) names of one rank's training batches, epoch by epoch.

    All ranks shuffle alike, and each takes its part of every global batch, so two ranks with
    batch b see in each step what one rank with batch 2b sees. The images of an incomplete last
    global batch wait for another epoch.
    """

    def __init__(self, length: int, batch_size: int, *, rank: int, world_size: int, seed: int):
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """What the next iteration gives: this epoch, from this batch on."""
        self.epoch = epoch
        self.first_batch = first_batch

    def __len__(self) -> int:
        """Batches in a whole epoch, for this rank as for any other."""
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        step = self.batch_size * self.world_size
        for batch in range(self.first_batch, len(self)):
            start = batch * step + self.rank * self.batch_size
            yield [(self.epoch, int(index)) for index in order[start:start + self.batch_size]]


class EvalBatches(paddle.io.Sampler):
    """The names of one rank's evaluation batches: every image once over all ranks, none twice."""

    def __init__(self, length: int, batch_size: int, *, rank: int, world_size: int):
        self.indices = range(rank, length, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start:start + self.batch_size]]


def get_dataset(config, is_train: bool) -> ListDataset:
    """The training or the validation set that `config` names."""
    if is_train:
        transform = build_train_transform(config)
    else:
        evaluate = build_eval_transform(config)

        def transform(image, _):
            return evaluate(image)
    root = config.DATA.DATA_PATH
    return ListDataset(os.path.join(root, LIST_FILES[is_train]), root, transform,
                       num_classes=config.MODEL.NUM_CLASSES, seed=config.SEED)


def get_dataloader(config, dataset: ListDataset, is_train: bool, *, rank: int = 0,
                   world_size: int = 1) -> paddle.io.DataLoader:
    """Batches (images (N, 3, H, W) float32, labels (N,) int64) of one rank.

    The loader's `batch_sampler` is a `TrainBatches` or an `EvalBatches`.

    Raises:
        InputError: fewer training images than one batch of all ranks.
    """
    if is_train:
        batches = TrainBatches(len(dataset), config.DATA.BATCH_SIZE, rank=rank,
                               world_size=world_size, seed=config.SEED)
        if len(batches) == 0:
            raise InputError(
                f'{dataset.list_file} lists {len(dataset)} images, fewer than one batch '
                f'(DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} x {world_size} processes); '
                'give a smaller -batch_size')
    else:
        batches = EvalBatches(len(dataset), config.DATA.BATCH_SIZE_EVAL or config.DATA.BATCH_SIZE,
                              rank=rank, world_size=world_size)
    workers = config.DATA.NUM_WORKERS
    return paddle.io.DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                                persistent_workers=workers > 0,
                                worker_init_fn=leave_signals_to_the_parent)


def leave_signals_to_the_parent(_worker_id: int) -> None:
    """Make a worker a process group of its own.

    Ctrl-C and Paddle's launcher signal the whole group of a training process, which then needs its
    workers until it has saved.
    """
    os.setpgid(0, 0)
