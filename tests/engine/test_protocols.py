"""Robustness benchmarks: generated pictures in the real folders, against results by plain numpy."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from harness import calibrated, finish, finish_ranks, main_status, make_run, metrics
from PIL import Image
from scipy import special
from tiny import command, table

from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.config import get_config
from replknet_paddle.data.dataset import EvalBatches
from replknet_paddle.engine import protocols
from replknet_paddle.engine.protocols import ALEXNET_ERRORS, CORRUPTED, ProtocolTask, folders_of

SYNSETS = sorted(folders_of("imagenet-sketch"))
FEW = {SYNSETS[i]: [i] for i in (300, 301)}  # classes of a small ImageNet-C


def make_pictures(root, protocol: str) -> None:
    """One picture of a colour and noise in each folder, or two for each pair of cue-conflict."""
    rng, names = np.random.default_rng(0), list(folders_of(protocol))
    paths = [f"{name}/1.png" for name in names]
    if protocol == "imagenet-c":
        paths = [f"{part}/{name}/{i}.png" for part in CORRUPTED for name in FEW for i in range(2)]
    if protocol == "cue-conflict":
        paths = [f"{a}/{a}{i}-{b}{i + 3}.png" for a in names for b in names for i in (1, 20)]
    for path in paths:
        pixels = rng.integers(0, 60, (32, 32, 3)) + rng.integers(0, 190, 3)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype("uint8")).save(root / path)


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """A folder with the pictures of each benchmark in a folder of its name, and wrong ones."""
    root = tmp_path_factory.mktemp("benchmarks")
    for protocol in protocols.PROTOCOLS:
        make_pictures(root / protocol, protocol)
    for name, file in (("damaged", "cat1-bear4.png"), ("renamed", "cat1-bird.png")):
        shutil.copytree(root / "cue-conflict", root / name)
        (root / name / "cat" / file).write_text("no picture")
    return root


@pytest.fixture(scope="module")
def network(tmp_path_factory, benchmarks):
    """A network of 1000 classes that tells these pictures apart, and its run folder."""
    folder = make_run(tmp_path_factory.mktemp("run"), classes=1000)
    network = calibrated(folder)
    network.train()
    logits_of(network, benchmarks / "cue-conflict", is_whole=True)  # for the running statistics
    network.eval()
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    write_safetensors(folder / "best", state, metadata={})
    return network, folder


def logits_of(model, root, *, is_whole: bool) -> tuple[list[str], np.ndarray]:
    """The paths below `root`, and the logits of these pictures: whole, or cropped by Pillow."""
    paths, inputs = sorted(root.rglob("*.png")), []
    for path in paths:
        image = Image.open(path)
        if not is_whole:
            image = image.resize((64, 64), Image.Resampling.BICUBIC).crop((16, 16, 48, 48))
        pixels = (np.asarray(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        inputs.append(pixels.transpose(2, 0, 1).astype("float32"))
    with paddle.no_grad():
        parts = [model(paddle.to_tensor(np.stack(p))) for p in np.array_split(inputs, 8)]
    logits = np.concatenate([part.numpy() for part in parts]).astype("float64")
    return [str(path.relative_to(root)) for path in paths], logits


def defined_figures(protocol: str, paths: list[str], logits: np.ndarray) -> dict[str, float]:
    """The figures, by the definitions."""
    logits = logits - logits.max(axis=1, keepdims=True)
    if protocol == "cue-conflict":
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        means = {name: probabilities[:, c].mean(axis=1) for name, c in folders_of(protocol).items()}
        answers = [max(means, key=lambda name: means[name][i]) for i in range(len(paths))]
        cues = [re.findall("[a-z]+", path)[1:3] for path in paths]
        shape = sum(answer == s != t for answer, (s, t) in zip(answers, cues))
        texture = sum(answer == t != s for answer, (s, t) in zip(answers, cues))
        assert len(paths) == 512 and min(shape, texture) > 5 and shape != texture
        percent = {"shape_percent": shape / 4.8, "texture_percent": texture / 4.8}
        return {"shape_bias": shape / (shape + texture), **percent}
    labels = np.array([SYNSETS.index(path.split("/")[-2]) for path in paths])
    kept = np.unique(labels)
    right = logits[np.arange(len(labels)), labels]
    ranks = (logits[:, kept] > right[:, None]).sum(axis=1)
    top1, top5 = (100 * np.mean(ranks < k) for k in (1, 5))
    assert top5 > 0
    if protocol == "imagenet-c":
        ce = {}
        for name, error in ALEXNET_ERRORS.items():
            is_here = [path.startswith(name) for path in paths]  # as many in each severity
            ce[f"{name}_ce_percent"] = 100 * np.mean(ranks[is_here] > 0) / error
        return {"mce_percent": sum(ce.values()) / 15, "top1_percent": top1, **ce}
    loss = np.mean(np.log(np.exp(logits[:, kept]).sum(axis=1)) - right)
    return {"top1_percent": top1, "top5_percent": top5, "loss": loss}


def on_few_classes(arguments) -> int:
    """The command, for an ImageNet-C of the classes FEW instead of 75,000 folders."""
    protocols.folders_of = lambda name: FEW
    return main_status(arguments)


@pytest.mark.parametrize("ranks", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
@pytest.mark.parametrize("protocol", ["imagenet-a", "imagenet-c", "cue-conflict"])
def test_figures_are_those_of_the_definition(protocol, ranks, benchmarks, network, tmp_path):
    root, is_whole = benchmarks / protocol, protocol != "imagenet-a"
    flags = [f"-pretrained={network[1] / 'best'}", f"-protocol={protocol}", "-batch_size=50"]
    flags += ["-eval", f"-data_path={root}", f"-output={tmp_path / 'run'}", f"-workers={ranks % 2}"]
    flags += ["-opts", "DATA.CROP_PCT", "0.5"]  # an exact half, for any order of resizing
    if has_report := ranks == 2 and not is_whole:
        flags.append(f"-report={tmp_path / 'report'}")
    how = {"target": on_few_classes} if protocol == "imagenet-c" else {}
    finish(flags, **how) if ranks == 1 else finish_ranks(flags, ranks=ranks, **how)
    wanted = defined_figures(protocol, *logits_of(network[0], root, is_whole=is_whole))
    prefix = protocol.replace("-", "_")
    [record] = metrics(tmp_path / "run")
    found = {name: record[f"{prefix}_{name}"] for name in wanted}
    assert found.pop("loss", 0) == pytest.approx(wanted.pop("loss", 0), rel=1e-4)
    assert found == pytest.approx(wanted, rel=1e-12)
    if has_report:
        rows = table(tmp_path / "report" / "per_class.csv")
        assert sum(int(row["right"]) for row in rows) == 2 * wanted["top1_percent"]


def test_classes_are_those_of_the_benchmarks():
    """As eval.py of ImageNet-A and -R, and human_categories.py of model-vs-human have them."""
    a, r = ([*folders_of(name).values()] for name in ("imagenet-a", "imagenet-r"))
    assert sum(a[:5], []) == [6, 11, 13, 15, 17] and sum(a[-4:], []) == [984, 986, 987, 988]
    assert sum(r[:5], []) == [1, 2, 4, 6, 8] and sum(r[-4:], []) == [980, 981, 983, 988]
    assert len(a) == len(r) == 200 and len(set(SYNSETS)) == 1000
    found = folders_of("cue-conflict")
    assert found["bear"] == [294, 295, 296, 297] and found["chair"] == [423, 559, 765, 857]
    assert found["truck"] == [555, 569, 656, 675, 717, 734, 864, 867]
    assert len(found) == 16 and len(found["dog"]) == 109 and sum(map(len, found.values())) == 207


def test_folders_of_imagenet_v2_are_named_by_the_number_of_their_class(benchmarks, network):
    """Not 0, 1, 10, 100... counted through."""
    data = str(benchmarks / "imagenet-v2")
    config = get_config(network[1] / "config.yaml", DATA__DATA_PATH=data)
    data = ProtocolTask("imagenet-v2", config).dataset(config, False)
    assert len(data) == 1000
    assert [data.path(i) for i in range(1000)] == [f"{label}/1.png" for label in data.labels]


def test_masked_classes_do_not_count_whatever_their_logits(network):
    logits = np.random.default_rng(0).normal(size=(50, 1000)).astype("float32")
    kept = np.array([*folders_of("imagenet-r").values()]).ravel()
    logits[:, 0], logits[:25, 3] = np.inf, np.nan  # neither is a class of ImageNet-R
    best = kept[logits[:, kept].argmax(axis=1)]
    labels = np.where(np.arange(50) < 10, kept[7], best)
    sampler = EvalBatches(50, 50, rank=0, world_size=1)
    loader = SimpleNamespace(batch_sampler=sampler, dataset=range(50))
    images = paddle.to_tensor(np.broadcast_to(logits[:, :, None, None], (50, 1000, 1, 1)).copy())
    config = get_config(network[1] / "config.yaml")
    for flip in (False, True):
        task = ProtocolTask("imagenet-r", config, flip=flip)
        sums = task.metric_sums(config, loader)
        outputs = task.inference(config, lambda images: images[:, :, 0, 0])(images)
        sums.add(outputs, paddle.to_tensor(labels))
        total = sums.total()
        assert total.top1 == (best == labels).sum() >= 40
        shares = special.softmax(logits[:, kept].astype("float64"), axis=1)
        wanted = -np.log(shares[np.arange(50), np.searchsorted(kept, labels)])
        np.testing.assert_allclose(total.losses, wanted, rtol=1e-5)


def test_alexnet_has_100_percent_and_without_a_decision_there_is_no_shape_bias():
    rates = np.repeat([*ALEXNET_ERRORS.values()], 5)
    counts = np.stack([np.full(75, 1e6), 1e6 * (1 - rates), rates], axis=1)
    figures = protocols.corruption_figures(counts)
    assert figures.pop("top1_percent") == pytest.approx(100 * (1 - rates.mean()))
    assert [*figures.values()] == pytest.approx([100] * 16)
    sums = protocols.FigureSums(protocols.cue_figures)
    sums.add(paddle.full([3, 16], np.nan), paddle.to_tensor([1000, 2003, 5]))
    assert np.isnan(sums.total().record("x")["x_shape_bias"]) and sums.images == 3


BAD = [
    ("imagenet-aa", "did you mean imagenet-a?"),
    ("imagenet-a -data_path={b}/imagenet-r", "114 of 200 folders", "114 are unknown ['n0"),
    ("cue-conflict -data_path={b}", "16 of 16 folders", "8 are unknown"),
    ("imagenet-a -data_path={b}/none", "no folder", "/none"),
    ("imagenet-c -data_path={b}/imagenet-a", "no folder", "gaussian_noise/1"),
    ("imagenet-a -opts MODEL.NUM_CLASSES 21841", "NUM_CLASSES 21841; allowed: RepLKNet and 1000"),
    ("imagenet-c -report=new", "-report with -protocol imagenet-c; allowed: the others"),
    ("cue-conflict -data_path={b}/renamed", "cat1-bird.png: not of cue-conflict; allowed: cat1-"),
    ("cue-conflict -data_path={b}/damaged", "damaged: cannot read image cat/cat1-bear4.png"),
    ("imagenet-a -cfg=configs/upernet_nano_shapes.yaml", "MODEL.TYPE UPerNet"),
]


@pytest.mark.parametrize("words, parts", [(words, parts) for words, *parts in BAD])
def test_bad_input_gets_one_message(words, parts, benchmarks, network, capfd):
    words = words.format(b=benchmarks).split()
    assert command("eval")([str(network[1]), "-nproc=1", "-protocol", *words]) == 2
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert all(part in said for part in parts), said
