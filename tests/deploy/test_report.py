"""The report of an evaluation: the numbers are right, and the page holds all of it."""

import base64
import os
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from tiny import rows_of

from replknet_paddle.analysis.outcomes import Outcomes
from replknet_paddle.deploy.report import Evaluated, draw_confusion_matrix, write_report
from replknet_paddle.runtime.errors import InputError

NAMES = ["Mäuse <b>", "猫 & dogs", "🐟", 'no "images"', "birds"]

# Label, first and second class, their probabilities.
ANSWERS = [
    (0, 0, 1, 0.9, 0.1),
    (0, 1, 0, 0.8, 0.1),
    (0, 1, 2, 0.6, 0.3),
    (0, 2, 0, 0.99, 0.01),
    (1, 1, 0, 0.5, 0.2),
    (1, 1, 2, 0.7, 0.2),
    (2, 4, 2, 0.95, 0.05),
    (4, 4, 0, 1.0, 0.0),
]


def outcomes_of(answers, num_classes=5) -> Outcomes:
    values = np.array(answers)
    labels, classes, scores = values[:, 0].astype(int), values[:, 1:3].astype(int), values[:, 3:]
    margins = scores @ [-1, 1] if num_classes == 2 else None
    nothing = np.zeros(len(values))
    return Outcomes(num_classes, labels, nothing, nothing, classes, scores, margins)


def evaluated_of(answers, names=NAMES) -> Evaluated:
    return Evaluated(
        model="nano <1>",
        weights="output/run/best",
        data="data/val_list.txt",
        metrics="top-1 50.00 %",
        class_names=names,
        outcomes=outcomes_of(answers, len(names)),
        path=lambda index: f"val/猫 & <x>/{index}.jpg",
        picture=lambda index: Image.new("RGB", (60, 40), (10 * index, 0, 0)),
    )


class Page(HTMLParser):
    """Tags, attributes and text of a page; an error for what is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def attributes(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    write_report(folder, evaluated_of(ANSWERS))
    return folder


@pytest.fixture(scope="module")
def page(report):
    return Page((report / "report.html").read_text("utf-8"))


def test_tables_have_what_counting_by_hand_gives(report):
    header, *rows = rows_of(report / "per_class.csv")
    percents = ["accuracy_percent", "precision_percent", "f1_percent"]
    assert header == ["label", "class", "images", "right", *percents]
    assert rows == [
        ["0", NAMES[0], "4", "1", "25", "100", "40"],
        ["1", NAMES[1], "2", "2", "100", "50", "66.6667"],
        ["2", NAMES[2], "1", "0", "0", "0", "0"],
        ["3", NAMES[3], "0", "0", "", "", ""],
        ["4", NAMES[4], "1", "1", "100", "50", "66.6667"],
    ]
    header, *rows = rows_of(report / "confusion_matrix.csv")
    assert header == ["true class", *NAMES] and [row[0] for row in rows] == NAMES
    wanted = np.zeros((5, 5), int)
    for label, first, *_ in ANSWERS:
        wanted[label, first] += 1
    assert np.array_equal(np.array([row[1:] for row in rows]).astype(int), wanted)


def test_mistakes_come_by_confidence_and_confusions_by_count():
    outcomes = outcomes_of(ANSWERS)
    assert outcomes.confident_mistakes(10) == [3, 6, 1, 2]
    assert outcomes.confident_mistakes(2) == [3, 6]
    assert outcomes.confusions(10) == [(0, 1, 2), (0, 2, 1), (2, 4, 1)]
    assert outcomes.confusions(1) == [(0, 1, 2)]


def test_the_page_needs_nothing_else(report, page):
    text = (report / "report.html").read_text("utf-8")
    assert not page.attributes("script") and not page.attributes("link")
    assert all(image["src"].startswith("data:image/") for image in page.attributes("img"))
    assert not re.search(r"https?://|url\(|@import", text)
    assert "default-src 'none'" in text


def test_the_page_holds_the_files_and_describes_them(report, page):
    images = [
        base64.b64decode(attributes["src"].split(",", 1)[1])
        for attributes in page.attributes("img")
    ]
    assert images[0] == (report / "confusion_matrix.png").read_bytes()
    files = sorted((report / "mistakes").iterdir())
    assert images[1] == (report / "reliability.png").read_bytes()
    assert [path.read_bytes() for path in files] == images[2:] and len(files) == 4
    written = (report / "report.html").read_text("utf-8")
    alts = [attributes["alt"] for attributes in page.attributes("img")]
    assert alts[2] == "is Mäuse <b>; taken for 🐟 (99.0 %)"
    assert all(alts)
    text = "".join(page.text)
    for said in ("nano <1>", "50.00 %", "no images", *NAMES, "val/猫 & <x>/3.jpg"):
        assert said in text, said
    assert not page.attributes("b") and not page.attributes("x")  # names are text
    mean = (25 + 100 + 0 + 100) / 4
    assert f"{mean:.2f} %balanced accuracy, the mean of the classes' accuracies" in text
    assert f"{(40 + 2 * 200 / 3 + 0) / 4:.2f} %macro F1" in text and "4 of 5" in text
    # By bins: 0.5 right; 0.6 wrong; 0.7 right; 0.8 wrong; 0.9 right; 0.95, 0.99, 1.0, one right.
    distances = [0.5, 0.6, 0.3, 0.8, 0.1, 0.95 + 0.99 + 1.0 - 1]
    assert f"{100 * sum(distances) / 8:.2f} %</strong>expected calibration error" in written


def test_two_classes_have_figures_of_their_own(tmp_path):
    answers = [(0, 0, 1, 0.9, 0.1), (0, 0, 1, 0.7, 0.3), (1, 0, 1, 0.8, 0.2)]
    for images, figure in ((3, "0.5000"), (2, "-")):  # two are of one class
        write_report(tmp_path / f"{images}", evaluated_of(answers[:images], NAMES[:2]))
        text = (tmp_path / f"{images}" / "report.html").read_text("utf-8")
        for name in ("ROC AUC", "average precision"):
            assert f"<strong>{figure}</strong>{name}<" in text


def test_pictures_are_what_they_say(report):
    with Image.open(report / "confusion_matrix.png") as matrix:
        assert min(matrix.size) > 250
    for path in (report / "mistakes").iterdir():
        assert Image.open(path).size == (720, 240)


def test_an_answer_that_is_nan_has_no_heat_map(tmp_path):
    evaluated = evaluated_of([(0, 1, 2, 0.6, 0.3), (0, 2, 1, np.nan, np.nan)])
    evaluated = replace(evaluated, heat=lambda index, picture: picture.resize((384, 256)))
    write_report(tmp_path / "new", evaluated)
    drawn = sorted((tmp_path / "new" / "mistakes").iterdir())
    assert [Image.open(path).size for path in drawn] == [(720 + 336 + 12, 240), (720, 240)]


@pytest.mark.parametrize("classes", [3, 60])
def test_shades_of_the_matrix_are_shares_of_the_row(classes):
    counts = np.zeros((classes, classes), int)
    counts[0, 0], counts[0, 2], counts[1, 1] = 3, 1, 8
    names = ["x" * 500, "$x_y$", *map(str, range(2, classes))]
    axes, _ = draw_confusion_matrix(counts, names).axes
    shares = np.zeros_like(counts, float)
    shares[0, 0], shares[0, 2], shares[1, 1] = 0.75, 0.25, 1
    np.testing.assert_array_equal(axes.images[0].get_array(), shares)
    has_room = classes < 40
    cells = {(*text.get_position()[::-1], text.get_text()) for text in axes.texts}
    assert cells == ({(0, 0, "3"), (0, 2, "1"), (1, 1, "8")} if has_room else set())
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert (labels == ["x" * 27 + "...", "$x_y$", "2"]) == has_room


def test_without_matplotlib_the_numbers_are_there_and_it_says_what_to_install(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(tmp_path / "new", evaluated_of(ANSWERS))
    files = {"report.html", "per_class.csv", "confusion_matrix.csv", "mistakes"}
    assert set(os.listdir(tmp_path / "new")) == files
    page = Page((tmp_path / "new" / "report.html").read_text("utf-8"))
    for text in ("".join(page.text), caplog.text):
        assert "this needs matplotlib" in text and "requirements/plots.txt" in text


def test_all_right_and_no_mistakes(tmp_path):
    write_report(tmp_path / "new", evaluated_of([ANSWERS[0], ANSWERS[4]]))
    assert not (tmp_path / "new" / "mistakes").exists()
    text = (tmp_path / "new" / "report.html").read_text("utf-8")
    Page(text)
    assert "every image is right" in text


def test_one_image_is_no_images_and_tables_have_six_digits(tmp_path):
    write_report(tmp_path / "one", evaluated_of([ANSWERS[0]]))
    assert "<strong>1</strong>image</div>" in (tmp_path / "one" / "report.html").read_text("utf-8")
    write_report(tmp_path / "three", evaluated_of([ANSWERS[0], ANSWERS[1], ANSWERS[2]]))
    text = (tmp_path / "three" / "report.html").read_text("utf-8")
    assert "<strong>3</strong>images</div>" in text and "33.33 %" in text
    assert rows_of(tmp_path / "three" / "per_class.csv")[1][4] == "33.3333"


def test_a_matrix_of_21841_classes_is_left_out(tmp_path):
    names = [str(i) for i in range(21841)]
    write_report(tmp_path / "new", evaluated_of(ANSWERS, names))
    files = ["mistakes", "per_class.csv", "reliability.png", "report.html"]
    assert sorted(os.listdir(tmp_path / "new")) == files
    assert "more than 1,000 classes" in (tmp_path / "new" / "report.html").read_text()


def test_an_error_leaves_nothing(tmp_path):
    def broken(_):
        raise OSError(28, "No space left on device")

    evaluated = evaluated_of(ANSWERS)
    object.__setattr__(evaluated, "picture", broken)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path / "new", evaluated)
    assert os.listdir(tmp_path) == []
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "kept").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        write_report(tmp_path / "used", evaluated)
    assert os.listdir(tmp_path / "used") == ["kept"]


def test_a_browser_without_a_network_shows_all_of_it(report, tmp_path):
    playwright_api = pytest.importorskip("playwright.sync_api", reason="requirements/test.txt")
    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this system")
    shutil.copy(report / "report.html", tmp_path)  # without the files beside it
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 400, "height": 800}, offline=True)
        page = context.new_page()
        complaints, requests = [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: requests.append(request.url.split(":")[0]))
        page.goto(f"file://{tmp_path / 'report.html'}")
        sizes = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        width = page.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert len(sizes) == 6 and all(sizes) and complaints == []
    assert requests.count("file") == 1 and set(requests) <= {"file", "data"}
    assert width <= 400
