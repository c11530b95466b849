"""The package as others install it: a wheel in an environment of its own, beside any files."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
from harness import make_run
from tiny import FIXTURES, ROOT

# Names that the project or a user's own folder may well have; importing one of them is an error.
BESIDE = ("config", "datasets", "tools", "errors", "replknet", "engine", "data", "model", "ops")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    build = "from setuptools import build_meta as b; import sys; b.{}(sys.argv[1])"
    source = tmp_path_factory.mktemp("source") / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    for what in ("build_sdist", "build_wheel"):
        subprocess.run(
            [sys.executable, "-c", build.format(what), str(folder)],
            cwd=source,
            check=True,
            capture_output=True,
        )
    return folder


def test_the_wheel_holds_configs_and_sources_and_no_tests(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for pattern in ("configs/*.*", "replknet_paddle/ops/csrc/**/*.*", "replknet_paddle/**/*.cpp"):
        for path in ROOT.glob(pattern):
            if path.is_file():
                name = str(path.relative_to(ROOT))
                assert name.replace("configs/", "replknet_paddle/configs/", 1) in names or (
                    name in names
                )
    assert "replknet_paddle/py.typed" in names  # by which type checkers believe our annotations
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"replknet_paddle"}
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "replknet_paddle").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


def test_the_sdist_holds_what_a_wheel_is_built_from(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    wanted = {"configs/replknet_31b.yaml", "configs/imagenet1k_class_names.txt", "README.md"}
    wanted |= {"replknet_paddle/py.typed"}
    wanted |= {"requirements/common.txt", "replknet_paddle/ops/csrc/cpu/kernels.inc", "setup.py"}
    assert wanted <= names


@pytest.mark.slow
def test_installed_beside_a_users_own_files_everything_works(built, tmp_path):
    """In a virtual environment with the wheel, and Paddle from this environment."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python, replknet = venv / "bin" / "python", venv / "bin" / "replknet"
    site = next((venv / "lib").glob("python*/site-packages"))
    # Names a folder of packages, but not the checkout that is installed there as editable.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (wheel,) = built.glob("*.whl")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--quiet", wheel], check=True)
    for name in BESIDE:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('imported {name}.py')\n")
    (tmp_path / "run").mkdir()
    make_run(tmp_path / "run")
    cache = tmp_path / "cache"
    variables = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        "OMP_NUM_THREADS": "1",
        "REPLKNET_PADDLE_CACHE": str(cache),
    }

    def run(*command):
        done = subprocess.run(
            [str(part) for part in command],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=300,
            env=variables,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    printed = run(
        python,
        "-c",
        "import paddle, replknet_paddle\n"
        "assert 'site-packages' in replknet_paddle.__file__, replknet_paddle.__file__\n"
        "print(*replknet_paddle.list_models())\n"
        "with paddle.LazyGuard():\n"
        "    model = replknet_paddle.get_model('replknet-31b-1k-224')\n"
        "config = replknet_paddle.get_config('./configs/replknet_nano.yaml')\n"
        "model = replknet_paddle.build_replknet(config)\n"
        "print(model(paddle.zeros([1, 3, 64, 64])).shape)\n",
    )
    assert "replknet-31b-1k-224" in printed and "[1, 10]" in printed
    assert "predict" in run(replknet, "-h")
    picture = FIXTURES / "images" / "landscape_499x375.jpg"
    assert "landscape_499x375.jpg: " in run(replknet, "predict", "run", picture)
    assert "landscape_499x375.jpg: " in run(
        python, "-m", "replknet_paddle", "predict", "run", picture
    )
    assert any((cache / "compiled").glob("*.so"))

    subprocess.run([*pip, "uninstall", "--yes", "--quiet", "replknet-paddle"], check=True)
    assert list(venv.rglob("*replknet*")) == []
