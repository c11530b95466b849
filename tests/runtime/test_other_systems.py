"""Systems other than Linux: what works there, and the names of what does not."""

import json
import os
import subprocess
import sys

import numpy as np
from runs import make_run
from tiny import FIXTURES, ROOT, make_data

# The systems' differences are made before anything of the project is imported, anew for each. Other
# packages are imported first: they have builds of their own for each system, and these are Linux's.
PROGRAM = """
import builtins, ctypes, json, logging, multiprocessing, os, pkgutil, sys

import concurrent.futures, http.server, numpy, paddle, paddle.inference, PIL.Image, tqdm, yacs

for extra in "matplotlib.figure onnx onnxruntime openvino scipy.io sklearn.datasets".split():
    try:
        __import__(extra)
    except ImportError:
        pass

del os.sched_getaffinity, os.fork, os.forkpty
sys.modules["fcntl"] = sys.modules["resource"] = None
really_open = open


def open_without_proc(file, *args, **kwargs):
    if str(file).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(2, "No such file or directory", file)
    return really_open(file, *args, **kwargs)


def library(name, *args, **kwargs):
    raise OSError("no shared libraries of Linux here")


builtins.open = open_without_proc
ctypes.CDLL = library
logging.basicConfig(level=logging.INFO)


def import_and_predict(run, picture, data, lock):
    import replknet_paddle

    for module in pkgutil.walk_packages(replknet_paddle.__path__, "replknet_paddle."):
        if not module.name.endswith("__main__"):
            __import__(module.name)

    from replknet_paddle.config import get_config
    from replknet_paddle.data.dataset import get_dataloader, get_dataset
    from replknet_paddle.deploy.predict import Predictor
    from replknet_paddle.runtime.cores import available_cores
    from replknet_paddle.runtime.errors import InputError
    from replknet_paddle.runtime.files import locked

    assert available_cores() == os.cpu_count()
    with locked(lock):
        pass
    result = replknet_paddle.inference_model(Predictor(run, backend="dygraph"), picture)
    config = get_config(run + "/config.yaml", DATA__DATA_PATH=data)
    images = [images for images, _ in get_dataloader(config, get_dataset(config, False), False)]
    config = get_config(run + "/config.yaml", DATA__DATA_PATH=data, DATA__NUM_WORKERS=2)
    try:
        next(iter(get_dataloader(config, get_dataset(config, False), False)))
        refused = None
    except InputError as error:
        refused = str(error)
    scores = [float(score) for score in result["pred_scores"]]
    return {"scores": scores, "batches": len(images), "refused": refused}


sys.platform = "darwin"
print(json.dumps(import_and_predict(*sys.argv[1:])))
"""


def test_macos_imports_and_predicts_and_names_what_it_lacks(tmp_path):
    run, data = make_run(tmp_path), tmp_path / "data"
    make_data(data, train=4, val=9)
    picture = str(FIXTURES / "images" / "landscape_499x375.jpg")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run), picture, str(data), str(tmp_path / "lock")],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "REPLKNET_PADDLE_CACHE": str(tmp_path / "c")},
    )
    assert done.returncode == 0, done.stderr
    got, log = json.loads(done.stdout.splitlines()[-1]), done.stderr
    from replknet_paddle.deploy.predict import Predictor, inference_model

    here = inference_model(Predictor(str(run), backend="dygraph"), picture)["pred_scores"]
    assert np.allclose(got["scores"], here, rtol=0, atol=1e-5)  # other kernels of the convolutions
    assert np.ptp(here) > 0.1
    assert got["batches"] == 2
    assert "DATA.NUM_WORKERS is 2" in got["refused"] and "allowed here: 0" in got["refused"]
    assert log.count("compiled operators are for Linux; this is darwin") == 2, log
