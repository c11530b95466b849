"""The C interface of the convolution kernels, without a framework: csrc_test.cpp, also under
sanitizers.
"""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    *sorted((ROOT / "replknet_paddle/ops/csrc/cpu").glob("*.cpp")),
    ROOT / "replknet_paddle/ops/csrc/pointwise.cpp",
    Path(__file__).parent / "csrc_test.cpp",
]
STUB = Path(__file__).parent / "dnnl_stub.cpp"
COMPILER = shutil.which("g++") or shutil.which("c++")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")]

SANITIZERS = {
    "none": [],
    # Checks as calls: inlined, they make the unrolled kernels slow to compile.
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "--param=asan-instrumentation-with-call-threshold=0",
    ],
    "thread": ["-fsanitize=thread"],
}


def _link_works(flags: list[str], folder: Path) -> bool:
    (folder / "empty.cpp").write_text("int main() { return 0; }\n")
    command = [COMPILER, *flags, "empty.cpp", "-o", "empty"]
    linked = subprocess.run(command, cwd=folder, capture_output=True, timeout=60)
    return linked.returncode == 0 and (
        subprocess.run(["./empty"], cwd=folder, capture_output=True, timeout=60).returncode == 0
    )


@pytest.mark.parametrize(("sanitizer", "shapes"), [("none", 500), ("address", 10), ("thread", 10)])
def test_kernels_are_exact_deterministic_and_safe(tmp_path, sanitizer, shapes):
    flags = SANITIZERS[sanitizer]
    if not _link_works(flags, tmp_path):
        pytest.skip(f"the compiler has no runtime for {' '.join(flags)}")

    def compile_one(source: Path) -> subprocess.CompletedProcess:
        # The least of what Paddle's extensions are compiled with.
        command = [COMPILER, "-std=c++14", "-pthread", "-fPIC", "-O1" if flags else "-O2", *flags]
        command += ["-c", str(source), "-o", source.stem + ".o"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        for compiled in pool.map(compile_one, SOURCES):
            assert compiled.returncode == 0, compiled.stderr
    # The 1x1 products look for oneDNN among the libraries of their process, by this name.
    stub = [COMPILER, "-O2", "-fPIC", "-shared", "-Wl,-soname,libdnnl.so.3", str(STUB)]
    subprocess.run([*stub, "-o", "libdnnl.so.3"], cwd=tmp_path, check=True, timeout=120)
    objects = [source.stem + ".o" for source in SOURCES]
    link = [COMPILER, "-pthread", *flags, *objects, "-o", "csrc_test"]
    link += ["-Wl,--no-as-needed", "./libdnnl.so.3", "-Wl,-rpath,.", "-ldl"]
    subprocess.run(link, cwd=tmp_path, check=True, timeout=120)

    ran = subprocess.run(
        ["./csrc_test", str(shapes)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{shapes} shapes" in ran.stdout
    assert "passed" in ran.stdout
