"""PNG files beside Paddle, whose 2.6 breaks the system's zlib where it is loaded first."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny import ROOT

CHECK = """
import zlib
import numpy as np
from PIL import Image

labels = np.array(Image.open("labels.png"))
assert (labels == np.load("labels.npy")).all()
Image.fromarray(labels).save("written.png")
assert (np.array(Image.open("written.png")) == labels).all()
assert zlib.decompress(zlib.compress(labels.tobytes())) == labels.tobytes()
print("read, written and read again")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A label map of many values, written where zlib is right."""
    folder = tmp_path_factory.mktemp("png")
    labels = np.random.default_rng(0).integers(0, 150, (97, 131)).astype(np.uint8)
    Image.fromarray(labels).save(folder / "labels.png")
    np.save(folder / "labels.npy", labels)
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import paddle\nimport replknet_paddle",
        "import replknet_paddle\nimport paddle",
        "import paddle\nimport replknet_paddle.data.transforms.image",
    ],
)
def test_a_fresh_process_that_imports_paddle_before_pillow_reads_png(imports, folder):
    script = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{imports}\n{CHECK}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "read, written and read again"


def test_nothing_is_restored_where_nothing_is_wrong():
    from replknet_paddle.runtime import system_zlib

    assert system_zlib.restore() == 0
