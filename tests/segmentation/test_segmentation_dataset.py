"""List files of image and label pairs, and what is said of those that cannot be right."""

import numpy as np
import pytest
from PIL import ExifTags, Image

from replknet_paddle.runtime.errors import SampleError
from replknet_paddle.segmentation.data import IGNORED, SegmentationDataset, whole_image


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "an image").mkdir()
    for name in ("a", "an image/b c"):
        pixels, labels = rng.integers(0, 256, (7, 9, 3)), rng.integers(0, 3, (7, 9))
        Image.fromarray(pixels.astype("uint8")).save(tmp_path / f"{name}.png")
        Image.fromarray(labels.astype("uint8")).save(
            tmp_path / f"{name} l.png".replace("a l", "al")
        )
    return tmp_path


def dataset(folder, text, **options):
    (folder / "list.txt").write_text(text)
    return SegmentationDataset(
        str(folder / "list.txt"), str(folder), whole_image, num_classes=3, **options
    )


def test_pairs_with_and_without_spaces(folder):
    data = dataset(folder, "\ufeffa.png al.png\n\nan image/b c.png\tan image/b c l.png\n")
    assert len(data) == 2
    for index, name in enumerate(["a", "an image/b c"]):
        sample, labels = data.read_sample(0, index)
        assert (sample.pixels == np.array(Image.open(folder / f"{name}.png"))).all()
        wanted = np.array(Image.open(folder / ["al.png", "an image/b c l.png"][index]))
        assert (labels == wanted).all() and labels.dtype == np.uint8


def test_files_that_cannot_be_used_are_named_with_their_line(folder):
    Image.new("L", (3, 3)).save(folder / "small.png")
    Image.new("L", (9, 7), 3).save(folder / "wrong.png")
    (folder / "damaged.png").write_bytes((folder / "al.png").read_bytes()[:60])
    (folder / "link.png").symlink_to("/etc/hostname")
    cases = {
        "a.png none.png": "line 1: cannot read none.png: no such file",
        "none.png al.png": "line 1: cannot read none.png: no such file",
        "a.png small.png": "cannot read small.png: the label image has 3 x 3 pixels",
        "a.png wrong.png": "cannot read wrong.png: 63 label pixels are of no class, the first is 3",
        "a.png damaged.png": "cannot read damaged.png: damaged",
        "a.png a.png": "cannot read a.png: the label image has mode 'RGB'",
        "a.png link.png": "cannot read link.png: it leads to .* outside the data folder",
    }
    for line, message in cases.items():
        with pytest.raises(SampleError, match=message):
            dataset(folder, line).read_sample(0, 0)


def test_no_folder_and_no_list_say_what_to_give(tmp_path):
    for list_file, root in [("list.txt", tmp_path / "none"), ("list.txt", tmp_path)]:
        with pytest.raises(FileNotFoundError, match="train_list.txt and val_list.txt"):
            SegmentationDataset(str(tmp_path / list_file), str(root), whole_image, num_classes=3)


def test_zero_is_ignored_where_the_dataset_says_so(folder):
    data = dataset(folder, "a.png al.png", zero_is_ignored=True)
    labels = data.read_sample(0, 0)[1]
    numbers = np.array(Image.open(folder / "al.png")).astype(int)
    assert (labels == np.where(numbers == 0, IGNORED, numbers - 1)).all()


def test_labels_drawn_for_the_upright_photo_are_told_apart_from_wrong_ones(folder):
    photo = Image.new("RGB", (9, 7))
    exif = photo.getexif()
    exif[ExifTags.Base.Orientation] = 6
    photo.save(folder / "turned.jpg", exif=exif)
    Image.new("L", (7, 9)).save(folder / "upright.png")
    with pytest.raises(SampleError, match="7 x 9 .* 9 x 7; .*EXIF orientation"):
        dataset(folder, "turned.jpg upright.png").read_sample(0, 0)
    with pytest.raises(SampleError) as caught:
        dataset(folder, "a.png upright.png").read_sample(0, 0)
    assert "EXIF" not in str(caught.value)


def test_classes_that_no_label_has(folder):
    Image.fromarray(np.full((7, 9), 2, "uint8")).save(folder / "two.png")
    Image.fromarray(np.full((7, 9), IGNORED, "uint8")).save(folder / "nothing.png")
    text = "a.png two.png\na.png nothing.png\na.png missing.png\na.png al.png\n"
    data = dataset(folder, text)
    present = set(np.unique(np.array(Image.open(folder / "al.png"))).tolist())
    assert data.absent_classes(3) == sorted({0, 1} - present)
    assert data.absent_classes(3, rank=0, world_size=2) == [0, 1]
    assert data.absent_classes(3, rank=1, world_size=4) == [0, 1, 2]
