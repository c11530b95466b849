"""The published RepLKNet models: what each is, how good, and where its file is.

Accuracies are single-crop figures on ImageNet-1K's validation set, as their source gives them. A
record's config evaluates in the way that gave the first of them: the official code resizes images
to 384x384 regardless of their shape where PaddleViT crops, which is the whole gap between the two.
Parameters are counted in the form that was trained, multiply-adds in the merged form, as the paper
does.
"""

from dataclasses import dataclass
from typing import Literal

OFFICIAL_PAGE = "https://github.com/DingXiaoH/RepLKNet-pytorch#results-and-pre-trained-models"
PADDLEVIT_PAGE = "https://github.com/BR-IDL/PaddleViT/tree/develop/image_classification/RepLKNet"
MMPRETRAIN_FILES = "https://download.openmmlab.com/mmclassification/v0/replknet/"

# Licences of the repositories that publish the files.
LICENCES = {"official": "MIT", "mmpretrain": "Apache-2.0", "PaddleViT": "Apache-2.0"}


# The names, for editors to offer.
ModelName = Literal[
    "replknet-31b-1k-224",
    "replknet-31b-1k-384",
    "replknet-31b-22k1k-224",
    "replknet-31b-22k1k-384",
    "replknet-31l-22k1k-384",
    "replknet-xl-73m1k-320",
    "replknet-31b-22k",
    "replknet-31l-22k",
]


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in percent, and whose figures they are."""

    top1_percent: float
    top5_percent: float | None
    source: str


@dataclass(frozen=True)
class PublishedModel:
    """One published model.

    Attributes:
        name: PaddleViT's name for it, which is ours.
        config: file in configs/ that builds and evaluates it.
        pretrained_on: data set before ImageNet-1K, or None.
        image_size: side of the network's input, pixels.
        num_classes: size of the head.
        parameters: trained numbers, without running statistics.
        multiply_adds: per image at `image_size`, merged.
        accuracies: best-known source first; empty where none is published.
        drive_id: Google Drive id of the official repository's file.
        paddlevit_drive_id: the same of PaddleViT's `.pdparams`.
        mmpretrain_file: name of mmpretrain's file, which can be downloaded directly.
    """

    name: str
    config: str
    pretrained_on: str | None
    image_size: int
    num_classes: int
    parameters: int
    multiply_adds: int
    accuracies: tuple[Accuracy, ...]
    drive_id: str
    paddlevit_drive_id: str
    mmpretrain_file: str | None = None

    @property
    def alias(self) -> str | None:
        """mmpretrain's name for the model: its file's, less date and hash."""
        return self.mmpretrain_file and self.mmpretrain_file.rsplit("_", 1)[0]

    @property
    def url(self) -> str | None:
        """Where a program can download it; None where a person has to."""
        return self.mmpretrain_file and MMPRETRAIN_FILES + self.mmpretrain_file

    @property
    def sha256_start(self) -> str | None:
        """First 8 hex digits of the SHA-256 of the file behind `url`."""
        return self.mmpretrain_file and self.mmpretrain_file[: -len(".pth")].rsplit("-", 1)[1]

    @property
    def source(self) -> str:
        """Whose file `get_model` takes: a key of `LICENCES`."""
        return "mmpretrain" if self.mmpretrain_file else "official"

    @property
    def licence(self) -> str:
        return LICENCES[self.source]

    @property
    def page(self) -> str:
        """Where a person finds the official file."""
        return f"https://drive.google.com/file/d/{self.drive_id}/view"

    @property
    def paddlevit_page(self) -> str:
        """Where a person finds PaddleViT's file."""
        return f"https://drive.google.com/file/d/{self.paddlevit_drive_id}/view"


MODELS = (
    PublishedModel(
        "replknet-31b-1k-224",
        "replknet_31b.yaml",
        None,
        224,
        1000,
        79_864_168,
        15_353_525_248,
        (Accuracy(83.48, 96.57, "mmpretrain"), Accuracy(83.48, 96.57, "PaddleViT")),
        drive_id="1azQUiCxK9feYVkkrPqwVPBtNsTzDrX7S",
        paddlevit_drive_id="1w1-CUZekxJSeNdsdY_TkjUS4WobpXpU5",
        mmpretrain_file="replknet-31B_3rdparty_in1k_20221118-fd08e268.pth",
    ),
    PublishedModel(
        "replknet-31b-1k-384",
        "replknet_31b_384.yaml",
        None,
        384,
        1000,
        79_864_168,
        45_118_578_688,
        (Accuracy(84.84, 97.34, "mmpretrain"), Accuracy(84.58, 97.23, "PaddleViT")),
        drive_id="1vo-P3XB6mRLUeDzmgv90dOu73uCeLfZN",
        paddlevit_drive_id="1BZBeIq0SuQdj4w4REynS8UgDNGopMJVh",
        mmpretrain_file="replknet-31B_3rdparty_in1k-384px_20221118-03a170ce.pth",
    ),
    PublishedModel(
        "replknet-31b-22k1k-224",
        "replknet_31b_22k1k_224.yaml",
        "ImageNet-22K",
        224,
        1000,
        79_864_168,
        15_353_525_248,
        (Accuracy(85.20, 97.56, "mmpretrain"), Accuracy(85.20, 97.56, "PaddleViT")),
        drive_id="1DslZ2voXZQR1QoFY9KnbsHAeF84hzS0s",
        paddlevit_drive_id="1HamtzvO_QbC4qQrLaEc7yz-OMOCmrCuG",
        mmpretrain_file="replknet-31B_in21k-pre_3rdparty_in1k_20221118-54ed5c46.pth",
    ),
    PublishedModel(
        "replknet-31b-22k1k-384",
        "replknet_31b_22k1k_384.yaml",
        "ImageNet-22K",
        384,
        1000,
        79_864_168,
        45_118_578_688,
        (Accuracy(85.99, 97.75, "mmpretrain"), Accuracy(85.77, 97.68, "PaddleViT")),
        drive_id="1Sc46BWdXXm2fVP-K_hKKU_W8vAB-0duX",
        paddlevit_drive_id="1wyaL3Bxd_JILwVtsQRJQEpVMAom7lx77",
        mmpretrain_file="replknet-31B_in21k-pre_3rdparty_in1k-384px_20221118-76c92b24.pth",
    ),
    PublishedModel(
        "replknet-31l-22k1k-384",
        "replknet_31l_22k1k_384.yaml",
        "ImageNet-22K",
        384,
        1000,
        172_671_016,
        95_989_420_032,
        (Accuracy(86.63, 98.00, "mmpretrain"), Accuracy(86.38, 97.88, "PaddleViT")),
        drive_id="1JYXoNHuRvC33QV1pmpzMTKEni1hpWfBl",
        paddlevit_drive_id="1WuYif9niWr8qyOaPfFzChoGw869AmHI1",
        mmpretrain_file="replknet-31L_in21k-pre_3rdparty_in1k-384px_20221118-dc3fc07c.pth",
    ),
    PublishedModel(
        "replknet-xl-73m1k-320",
        "replknet_xl.yaml",
        "MegData-73M",
        320,
        1000,
        335_435_752,
        128_730_316_800,
        (Accuracy(87.8, None, "official"), Accuracy(87.57, 98.39, "mmpretrain")),
        drive_id="1tPC60El34GntXByIRHb-z-Apm4Y5LX1T",
        paddlevit_drive_id="1dpSE2lujUbnVMANhSwZ6HbW7mEEIuilK",
        mmpretrain_file="replknet-XL_meg73m-pre_3rdparty_in1k-320px_20221118-88259b1d.pth",
    ),
    PublishedModel(
        "replknet-31b-22k",
        "replknet_31b_22k.yaml",
        "ImageNet-22K",
        224,
        21841,
        101_226_193,
        15_374_866_432,
        (),
        drive_id="1PYJiMszZYNrkZOeYwjccvxX8UHMALB7z",
        paddlevit_drive_id="1uoQ9chuwOgKAnYxXzK0Tn0Euka7NoR5q",
    ),
    PublishedModel(
        "replknet-31l-22k",
        "replknet_31l_22k_384.yaml",
        "ImageNet-22K",
        384,
        21841,
        204_703_633,
        96_021_431_808,
        (),
        drive_id="16jcPsPwo5rko7ojWS9k_W-svHX-iFknY",
        paddlevit_drive_id="1ALUmkYpt4JhFFKgWvMYwRcpceiHRlyct",
    ),
)
