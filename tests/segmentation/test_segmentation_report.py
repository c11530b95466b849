"""The report of a segmentation's evaluation, against scikit-learn and label images."""

import html
import re
import shutil

import numpy as np
import paddle
import pytest
from harness import finish, finish_ranks, metrics
from PIL import Image
from tiny import rows_of

from replknet_paddle.commands import main
from replknet_paddle.config import get_config
from replknet_paddle.data.transforms.finish import RawSample
from replknet_paddle.segmentation.evaluate import SegmentationMetrics
from replknet_paddle.segmentation.pictures import palette_of
from replknet_paddle.segmentation.report import compare, write_segmentation_report

NAMES = ["background", "circle", "square", "triangle"]
PALETTE = palette_of("202020 e6194b 3cb44b 4363d8", 4)  # that of `run_folder`
IMAGES = 7  # over three processes: 3, 2 and 2


@pytest.fixture(scope="module")
def data(shapes, tmp_path_factory):
    """Shapes of several sizes, `IMAGES` of them for validation, the last one without a pixel that
    counts."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shutil.copytree(shapes, folder)
    lines = (folder / "train_list.txt").read_text().splitlines()[:IMAGES]
    (folder / "val_list.txt").write_text("\n".join(lines) + "\n")
    for i, line in enumerate(lines):
        for path in line.split():
            with Image.open(folder / path) as image:
                cut = image.crop((0, 0, 64 - 3 * i, 64 - i))
            if i == IMAGES - 1 and path.startswith("labels"):
                cut.paste(255, (0, 0, *cut.size))
            cut.save(folder / path)
    return folder


@pytest.fixture(scope="module")
def reports(run_folder, data, tmp_path_factory):
    """The folders of one evaluation in one, two and three processes: `of1` and `report_of1`, ..."""
    folder = tmp_path_factory.mktemp("evaluated")
    for ranks in (1, 2, 3):
        flags = ["-eval", "-pretrained", run_folder / "best", "-data_path", data]
        flags += ["-output", folder / f"of{ranks}", "-report", folder / f"report_of{ranks}"]
        if ranks == 1:
            finish(flags)
        else:
            finish_ranks(flags, ranks=ranks)
    return folder


@pytest.fixture(scope="module")
def maps(run_folder, data, tmp_path_factory):
    """Label map and prediction of each validation image, as the files have them."""
    out = tmp_path_factory.mktemp("predicted") / "out"
    lines = [line.split() for line in (data / "val_list.txt").read_text().splitlines()]
    images = [str(data / image) for image, _ in lines]
    command = ["segment", "predict", str(run_folder / "best"), *images, "-output", str(out)]
    assert main([*command, "-backend", "eager"]) == 0
    predicted = sorted(out.glob("*_labels.png"))
    assert len(predicted) == IMAGES
    paths = zip([data / labels for _, labels in lines], predicted)
    return [tuple(np.array(Image.open(path)) for path in pair) for pair in paths]


def test_any_number_of_processes_writes_the_same_report(reports):
    """In every byte, the order of the worst images and their scores among them."""
    contents = []
    for ranks in (1, 2, 3):
        folder = reports / f"report_of{ranks}"
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        contents.append({path.relative_to(folder): path.read_bytes() for path in files})
    assert len(contents[0]) == 4 + IMAGES - 1
    assert contents[0] == contents[1] == contents[2]


def test_tables_have_what_scikit_learn_counts(reports, maps):
    sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="requirements/demo.txt")
    labels, predicted = (np.concatenate([pair[i].ravel() for pair in maps]) for i in (0, 1))
    counted = labels != 255
    assert 0 < counted.sum() < len(labels)
    labels, predicted = labels[counted], predicted[counted]
    wanted = sklearn_metrics.confusion_matrix(labels, predicted, labels=range(4))
    header, *rows = rows_of(reports / "report_of3" / "confusion_matrix.csv")
    assert header == ["true class", *NAMES] and [row[0] for row in rows] == NAMES
    assert np.array_equal(np.array([row[1:] for row in rows]).astype(int), wanted)
    header, *rows = rows_of(reports / "report_of3" / "per_class.csv")
    assert header[2:] == ["pixels", "predicted", "right", "iou_percent", "accuracy_percent"]
    options = dict(labels=range(4), average=None)
    ious = 100 * sklearn_metrics.jaccard_score(labels, predicted, **options)
    accuracies = 100 * sklearn_metrics.recall_score(labels, predicted, **options)
    for i, row in enumerate(rows):
        counts = [np.sum(labels == i), np.sum(predicted == i), wanted[i, i]]
        assert row[:5] == [str(i), NAMES[i], *map(str, counts)]
        assert row[5:] == [f"{ious[i]:.6g}", f"{accuracies[i]:.6g}"]
    text = (reports / "report_of3" / "report.html").read_text()
    (record,) = metrics(reports / "of3")
    assert record["val_miou_percent"] == pytest.approx(np.mean(ious))
    for figure in (np.mean(ious), 100 * np.mean(labels == predicted)):
        assert f"<strong>{figure:.2f} %</strong>" in text
    assert f"<strong>{len(labels):,}</strong>" in text and f"<strong>{IMAGES}</strong>" in text


def test_the_worst_images_are_those_of_the_lowest_iou(reports, maps, data):
    """By sets of pixels of each image alone; the one without labels is not among them."""
    paths = (data / "val_list.txt").read_text().splitlines()
    scores = {}
    for line, (labels, predicted) in list(zip(paths, maps))[:-1]:
        ious = []
        for k in np.unique(labels[labels != 255]):
            is_label, is_predicted = labels == k, (predicted == k) & (labels != 255)
            ious.append((is_label & is_predicted).sum() / (is_label | is_predicted).sum())
        scores[line.replace(" ", ", ")] = 100 * np.mean(ious)
    assert len(set(scores.values())) == IMAGES - 1
    text = (reports / "report_of2" / "report.html").read_text()
    said = re.findall(r"<bdi>mean IoU ([\d.]+) %</bdi><br><bdi>(.*?)</bdi>", text)
    wanted = sorted(scores.items(), key=lambda item: item[1])
    assert said == [(f"{score:.2f}", path) for path, score in wanted]
    files = sorted((reports / "report_of2" / "mistakes").iterdir())
    assert [path.name for path in files] == [f"{i:02d}.jpg" for i in range(1, IMAGES)]


def test_what_is_drawn_is_what_was_counted(reports, maps, data):
    """The prediction and the label of the files, but for what JPEG does to them."""
    order = re.findall(
        r", labels/(\d+)\.png</bdi>", (reports / "report_of2/report.html").read_text()
    )
    lines = (data / "val_list.txt").read_text().splitlines()
    colours = np.concatenate([PALETTE, np.full((252, 3), 255)])
    for number, name in enumerate(order, start=1):
        labels, predicted = maps[[name in line for line in lines].index(True)]
        assert np.mean(labels == predicted) < 0.5
        with Image.open(reports / "report_of2" / "mistakes" / f"{number:02d}.jpg") as sheet:
            height, width = labels.shape
            shown = round(width * 240 / height)
            for left, classes in (
                (shown + 12, np.where(labels == 255, 255, predicted)),
                (2 * (shown + 12), labels),
            ):
                panel = sheet.crop((left, 28, left + shown, 28 + 240))
                pixels = np.asarray(panel.resize((width, height), Image.Resampling.NEAREST))
                is_same = np.abs(pixels.astype(int) - colours[classes]).max(axis=-1) < 50
                assert is_same.mean() > 0.95


def test_an_image_its_prediction_and_its_label_are_side_by_side():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 32, 3), "uint8")
    labels = rng.choice([0, 1, 3, 255], (24, 32)).astype("uint8")
    predicted = rng.integers(0, 4, (24, 32)).astype("uint8")
    sheet = np.asarray(compare(pixels, predicted, labels, NAMES, PALETTE))
    # Ten times as large, below the titles, 12 pixels apart.
    panels = [sheet[28 + 5 : 28 + 240 : 10, left + 5 : left + 320 : 10] for left in (0, 332, 664)]
    colours = np.concatenate([PALETTE, np.full((252, 3), 255)])
    np.testing.assert_array_equal(panels[0], pixels)
    np.testing.assert_array_equal(panels[1], colours[np.where(labels == 255, 255, predicted)])
    np.testing.assert_array_equal(panels[2], colours[labels])
    legend = sheet[:, 996:]
    assert all((legend == colour).all(axis=-1).sum() > 100 for colour in PALETTE)


class FakeDataset:
    """Images of one colour, 20 x 10 pixels; the right half of each label is ignored."""

    list_file = "data/<val>_list.txt"

    def __init__(self):
        self.read = []

    def files(self, index):
        return [f"images/<{index}>.png", f"labels/{index}.png"]

    def read_sample(self, epoch, index):
        self.read.append(index)
        labels = np.zeros((10, 20), "uint8")
        labels[:, 10:] = 255
        return RawSample(np.full((10, 20, 3), index, "uint8")), labels


@pytest.fixture
def written(tiny_upernet_file, tmp_path):
    """A report of 30 images, where nothing has the class `3 <b>`: its folder and the dataset."""
    confusion = np.array([[90, 10, 0, 0], [0, 50, 0, 0], [5, 5, 0, 0], [0, 0, 0, 0]])
    ious = np.linspace(99, 1, 30)
    config = get_config(tiny_upernet_file, MODEL__PRETRAINED="output/<RUN>/best")
    dataset, folder = FakeDataset(), tmp_path / "new"
    write_segmentation_report(
        folder,
        SegmentationMetrics(30, confusion, None, ious),
        config=config,
        class_names=["0", "1", "2", "3 <b>"],
        dataset=dataset,
        infer=lambda pixels: paddle.zeros([1, *pixels.shape[:2]], "uint8"),
    )
    return folder, dataset


def test_a_class_that_nothing_has_has_no_iou(written):
    rows = rows_of(written[0] / "per_class.csv")
    assert rows[3] == ["2", "2", "10", "0", "0", "0", "0"]  # missed, which is another thing
    assert rows[4] == ["3", "3 <b>", "0", "0", "0", "", ""]
    text = (written[0] / "report.html").read_text()
    cells = re.findall("<td[^>]*>(.*?)</td>", text[text.index("<bdi>3 &lt;b&gt;</bdi></td>") :])
    assert cells[:6] == ["0", "0", "0", "-", "-", ""]
    miou = 100 * (90 / 105 + 50 / 65 + 0 / 10) / 3
    assert f"mIoU {miou:.2f} % (3 of 4 classes)" in text
    assert "<strong>3 of 4</strong>classes with pixels" in text
    assert "<td><bdi>0 (5)</bdi></td>" in text  # what class 2 is taken for


def test_only_the_worst_are_read_and_names_are_text(written):
    folder, dataset = written
    assert dataset.read == list(range(29, 5, -1))
    assert len(list((folder / "mistakes").iterdir())) == 24
    text = (folder / "report.html").read_text()
    assert text.count("<img") == 25 and text.count("data:image/") == 25
    plain = html.unescape(text)
    for said in ("output/<RUN>/best", "data/<val>_list.txt", "images/<29>.png, labels/29.png"):
        assert said in plain and said not in text
