"""The page, as people meet it: in a browser, on a server of its own."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from PIL import Image
from runs import make_run
from tiny import FIXTURES, ROOT, command

from replknet_paddle.deploy.page import look
from replknet_paddle.deploy.predictor import Predictor, open_network

main = command("page")

PICTURE = FIXTURES / "images" / "landscape_499x375.jpg"
ROTATED = FIXTURES / "images" / "exif_rotated_400x300.jpg"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Python runs a file of this name at its start: it notes where the server connects to.
SITECUSTOMIZE = """
import os, sys
def note(event, arguments):
    if event == "socket.connect":
        text = f"connect {arguments[1]}"
    elif event == "socket.getaddrinfo":
        text = f"look up {arguments[0]}"
    else:
        return
    with open(os.environ["NETWORK_LOG"], "a") as file:
        file.write(text + "\\n")
sys.addaudithook(note)
"""


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the page needs Gradio")
    assert "pip install -r requirements/page.txt" in error


@pytest.mark.parametrize("port", ["0", "-1", "65536"])
def test_a_port_that_there_is_not_is_refused(capsys, tmp_path, port):
    assert main([str(tmp_path), f"--port={port}"]) == 2
    assert capsys.readouterr().err == (
        f"error: --port is {port}; allowed: an integer from 1 to 65535\n"
    )


def test_a_model_that_there_is_not_is_refused(capsys, tmp_path):
    pytest.importorskip("gradio", reason="Gradio is not installed (requirements/page.txt)")
    assert main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith(f"error: no model {tmp_path / 'nowhere'}; allowed: ")


@pytest.mark.parametrize("flag", ["-cfg=other.yaml", "--opts=SEED", "-opts=SEED"])
def test_an_export_takes_no_configuration(capsys, tmp_path, flag):
    pytest.importorskip("gradio", reason="Gradio is not installed (requirements/page.txt)")
    (tmp_path / "replknet.json").write_text("{}")
    assert main([str(tmp_path), flag]) == 2
    assert "which is no checkpoint or run folder; allowed" in capsys.readouterr().err


def test_a_checkpoint_takes_a_configuration(capsys, monkeypatch, run_folder):
    pytest.importorskip("gradio", reason="Gradio is not installed (requirements/page.txt)")
    shown = []
    monkeypatch.setattr("replknet_paddle.deploy.page.serve", lambda *_, **__: None)
    monkeypatch.setattr(
        "replknet_paddle.deploy.page.build_page", lambda *given, **_: shown.append(given)
    )
    monkeypatch.setattr("replknet_paddle.commands.page.signal.signal", lambda *_: None)
    opts = ["-opts", "DATA.CROP_PCT", "0.5"]
    assert main([str(run_folder), "-cfg", str(run_folder / "config.yaml"), *opts]) == 0
    ((predictor, network),) = shown
    assert network.config.DATA.CROP_PCT == 0.5
    assert predictor.backend.sidecar.preprocessing.crop_pct == 0.5


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), image_size=96, classes=7)


class Server:
    """The page of `run_folder` in a process of its own."""

    def __init__(self, run_folder, folder):
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.network_log = folder / "network.txt"
        self.network_log.write_text("")
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "replknet_paddle",
                "page",
                str(run_folder),
                f"--port={self.port}",
            ],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=open(folder / "stderr.txt", "w"),  # noqa: SIM115  # as long as the process
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(folder),
                "NETWORK_LOG": str(self.network_log),
                "TMPDIR": str(self.temporary),
                "GRADIO_ANALYTICS_ENABLED": "True",
            },
        )
        line = self.process.stdout.readline()  # it ends, if the process does
        assert self.address in line, (folder / "stderr.txt").read_text()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()

    def check_what_it_did(self):
        """It talked to no other machine, and left no uploads."""
        local = ("connect ('127.0.0.1',", "look up 127.0.0.1", "look up localhost", "look up None")
        lines = self.network_log.read_text().splitlines()
        assert lines and [line for line in lines if not line.startswith(local)] == []
        assert list(self.temporary.glob("replknet-page-*")) == []


@pytest.fixture(scope="module")
def server(run_folder, tmp_path_factory):
    pytest.importorskip("gradio", reason="Gradio is not installed (requirements/page.txt)")
    server = Server(run_folder, tmp_path_factory.mktemp("server"))
    yield server
    assert server.stop() == 143
    server.check_what_it_did()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed (requirements/test.txt)"
    )
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no Chromium is installed (none of {', '.join(BROWSERS)})")
    with api.sync_playwright() as playwright:
        # Its sandbox does not work for root, and it sees nothing but the page of this test.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    """The open page, and in `page.outside` what it asked of others."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.outside = []
    page.errors = []
    page.on("request", lambda request: note_outside(page, server, request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.set_default_timeout(60_000)
    page.goto(server.address)
    page.wait_for_selector("input[type=file]", state="attached")
    yield page
    page.close()


def note_outside(page, server, url):
    if not url.startswith((server.address, "data:", "blob:")):
        page.outside.append(url)


def upload(page, path):
    page.set_input_files("input[type=file]", str(path))


def shown_classes(page):
    """[(class, percent)] as the page has them, once it has them."""
    page.wait_for_selector("dd")
    names = page.locator("dt").all_inner_texts()
    return list(zip(names, page.locator("dd").all_inner_texts()))


@pytest.mark.parametrize("picture", [PICTURE, ROTATED], ids=lambda path: path.stem)
def test_a_dropped_picture_gives_its_classes_and_the_heat_map(page, run_folder, picture):
    network = open_network(run_folder)
    expected, heat_map = look(Predictor(network, backend="dygraph"), network, picture)
    upload(page, picture)
    shown = shown_classes(page)
    assert [name for name, _ in shown] == list(expected)
    for (_, percent), score in zip(shown, expected.values()):
        assert abs(float(percent.rstrip("%")) - 100 * score) <= 0.51
    source = page.locator("img[src*='image.png']").get_attribute("src")
    served = Image.open(io.BytesIO(page.request.get(source).body()))
    difference = np.asarray(served).astype(int) - np.asarray(heat_map)
    assert np.abs(difference).max() <= 1  # of 255
    assert np.ptp(np.asarray(heat_map, int) - np.asarray(heat_map, int).mean()) > 20
    assert page.outside == [] and page.errors == []


def test_a_file_that_is_no_picture_is_told_and_the_page_goes_on(page, tmp_path):
    upload(page, PICTURE)
    before = shown_classes(page)
    page.get_by_label("Remove Image").click()
    page.wait_for_selector("dd", state="detached")
    (tmp_path / "photo.jpg").write_text("not a picture")
    upload(page, tmp_path / "photo.jpg")
    page.get_by_text("cannot be classified: cannot identify it as any of").wait_for()
    assert page.locator("dd").count() == 0
    page.get_by_label("Remove Image").click()
    upload(page, PICTURE)
    assert shown_classes(page) == before


def test_a_huge_picture_is_told(page, tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    upload(page, tmp_path / "huge.png")
    page.get_by_text("decompression bomb").wait_for()
    assert page.locator("dd").count() == 0


def test_another_kind_of_file_is_refused_by_the_page(page):
    upload(page, FIXTURES / "README.md")
    page.get_by_text("Only image/* allowed").wait_for()


def ask(server, path):
    """What the page's server answers to a program that names a file of the server's machine."""
    api = f"{server.address}/gradio_api/call/classify"
    body = json.dumps({"data": [{"path": str(path)}]}).encode()
    request = urllib.request.Request(api, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{api}/{event}", timeout=60) as answer:
        return answer.read().decode()


def test_a_request_cannot_name_a_file_that_was_not_uploaded(server, tmp_path):
    (uploads,) = server.temporary.glob("replknet-page-*")
    copy = uploads / "copy.jpg"
    shutil.copyfile(PICTURE, copy)
    assert "confidences" in ask(server, copy)
    link = uploads / "link.jpg"
    link.symlink_to(PICTURE)
    for path in (PICTURE, link, f"{uploads}/../../{PICTURE}", f"{uploads}{os.sep}..", "/dev/zero"):
        answer = ask(server, path)
        assert "event: error" in answer and "confidences" not in answer, answer


def test_only_this_machine_reaches_it(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10):
        pass
    with pytest.raises(ConnectionRefusedError):  # another address of this machine
        socket.create_connection(("127.0.0.2", server.port), timeout=10)


def test_a_port_that_is_taken_is_told(server, run_folder, capsys):
    assert main([str(run_folder), f"--port={server.port}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot serve on port {server.port} of 127.0.0.1")
