"""The page, as people meet it: in a browser, on a server of its own."""

import base64
import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from harness import free_ports, make_run
from PIL import Image
from tiny import FIXTURES, ROOT, make_data

from replknet_paddle.deploy.drawing import fitted
from replknet_paddle.deploy.page import look, validation_examples
from replknet_paddle.deploy.predict import Predictor
from replknet_paddle.zoo import open_network

# Starting the server takes ten seconds; tests/deploy/test_page.py needs none.
pytestmark = pytest.mark.slow

PICTURE = FIXTURES / "images" / "landscape_499x375.jpg"
ROTATED = FIXTURES / "images" / "exif_rotated_400x300.jpg"
CLASSES = ["cat", "Äpfel & <b>Birnen</b>", "猫", "二叉树", "fish", "bird", "tree"]
ROUTES = [
    *(("GET", path) for path in ("/", "/config", "/nowhere", "/gradio_api/file=/etc/hostname")),
    *(("POST", path) for path in ("/gradio_api/upload", "/gradio_api/call/classify")),
    ("OPTIONS", "/gradio_api/queue/join"),
]
LABELS_OF_EXAMPLES = [0, 2, 5, 0, 3, 6]  # of pictures 0, 2, 5, 7, 10 and 13 of 14, by turns
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
with open(os.environ["NETWORK_LOG"], "a") as file:
    file.write("start\\n")
sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run on 7 classes, of which the validation list has 14 pictures."""
    data = tmp_path_factory.mktemp("data")
    make_data(data, train=7, val=14, classes=7)
    (data / "class_names.txt").write_text("\n".join(CLASSES) + "\n")
    folder = make_run(tmp_path_factory.mktemp("run"), image_size=96, classes=7)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["DATA"]["DATA_PATH"] = str(data)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@contextlib.contextmanager
def serving(run_folder, folder):
    """The page of `run_folder` in a process of its own, with its port, address, and temporary
    folder."""
    pytest.importorskip("gradio", reason="Gradio is not installed (requirements/page.txt)")
    port, temporary = free_ports(1)[0], folder / "temporary"
    temporary.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    settings = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(folder),
        "NETWORK_LOG": str(folder / "network.txt"),
        "TMPDIR": str(temporary),
        "GRADIO_ANALYTICS_ENABLED": "True",
        "GRADIO_MCP_SERVER": "True",
        "MPLBACKEND": "of_a_notebook",
    }
    with open(folder / "stderr.txt", "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "replknet_paddle", "page", run_folder, f"--port={port}"],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=os.environ | settings,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        line = process.stdout.readline()  # it ends, if the process does
        assert address in line, (folder / "stderr.txt").read_text()
        yield SimpleNamespace(port=port, address=address, temporary=temporary, process=process)
    finally:
        process.kill()
    # It talked to no other machine, and left no uploads.
    local = ("start", "connect ('127.0.0.1',", "look up 127.0.0.1", "look up localhost")
    lines = (folder / "network.txt").read_text().splitlines()
    assert lines
    assert [line for line in lines if not line.startswith((*local, "look up None"))] == []
    assert list(temporary.glob("replknet-page-*")) == []


@pytest.fixture(scope="module")
def server(run_folder, tmp_path_factory):
    with serving(run_folder, tmp_path_factory.mktemp("server")) as server:
        yield server
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 143


@pytest.mark.parametrize("number, status", [(signal.SIGHUP, 143), (signal.SIGINT, 130)])
def test_uploads_end_with_a_page_that_is_interrupted_or_loses_its_terminal(
    run_folder, tmp_path, number, status
):
    with serving(run_folder, tmp_path) as server:
        assert os.path.isfile(send_upload(server, PICTURE))
        server.process.send_signal(number)
        assert server.process.wait(30) == status


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
    """The open page, which must ask nothing of others and raise no error."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(60_000)
    page.goto(server.address)
    page.wait_for_selector("input[type=file]", state="attached")
    yield page
    page.close()
    own = (server.address, "data:", "blob:")
    assert [url for url in requests if not url.startswith(own)] == [] and errors == []


def upload(page, path):
    page.set_input_files("input[type=file]", str(path))


def shown_classes(page):
    """[(class, percent)] as the page has them, once it has them."""
    page.wait_for_selector("dd")
    names = page.locator("dt").all_inner_texts()
    return list(zip(names, page.locator("dd").all_inner_texts()))


def picture_in(page, part):
    """The picture in a part of the page, "heat" or "seen"; the latter is opened by a click."""
    image = page.locator(f"#{part} img")
    if part == "seen" and not image.is_visible():
        page.get_by_text("What the network sees").click()
    image.wait_for()
    data = base64.b64decode(image.get_attribute("src").partition("base64,")[2])
    return Image.open(io.BytesIO(data)).convert("RGB")


def difference(one, other):
    """Mean difference of two pictures, of 255, brought to one size."""
    left, right = (np.asarray(i.convert("RGB").resize((60, 60)), int) for i in (one, other))
    return np.abs(left - right).mean()


@pytest.mark.parametrize("picture", [PICTURE, ROTATED], ids=lambda path: path.stem)
def test_a_dropped_picture_gives_its_classes_and_the_heat_map(page, run_folder, picture):
    network = open_network(run_folder)
    expected = look(Predictor(network, backend="eager"), picture)
    upload(page, picture)
    shown = shown_classes(page)
    assert [name for name, _ in shown] == list(expected.classes)
    for (_, percent), score in zip(shown, expected.classes.values()):
        assert abs(float(percent.rstrip("%")) - 100 * score) <= 0.51
    heat = picture_in(page, "heat")
    assert not page.locator("#seen img").is_visible()
    seen = picture_in(page, "seen")
    large = fitted(Image.fromarray(expected.seen), (384, 384))
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(large))
    drawn = (np.asarray(picture, int) for picture in (heat, expected.heat))
    np.testing.assert_allclose(*drawn, atol=1)  # where sums differ in their last bits
    with Image.open(picture) as stored:
        assert heat.size == stored.size and difference(heat, stored) > 5


def test_a_turned_photo_is_shown_as_it_is_stored(page):
    """The file's EXIF data ask for a quarter turn, which browsers do of themselves."""
    upload(page, ROTATED)
    picture_in(page, "seen")
    with Image.open(ROTATED) as file:
        assert file.getexif()[0x0112] == 6
        stored = file.convert("RGB")
    turned = stored.transpose(Image.Transpose.ROTATE_270)
    preview = page.locator("#picture img")
    page.wait_for_function(
        "() => { const i = document.querySelector('#picture img'); return i && i.complete }"
    )
    shown = without_margins(Image.open(io.BytesIO(preview.screenshot())), stored.size)
    assert difference(shown, stored) < 8 < difference(shown, turned)
    assert "The file asks to be shown turned" in page.locator("#seen").inner_text()


def test_the_heat_map_lies_beside_the_picture_at_its_scale(page):
    upload(page, PICTURE)
    picture_in(page, "heat")
    page.wait_for_function("() => document.querySelector('#picture img')?.complete")
    picture, heat = (page.locator(f"#{part} img").bounding_box() for part in ("picture", "heat"))
    assert abs(picture["y"] - heat["y"]) < 30 and picture["x"] + picture["width"] < heat["x"]
    scales = [min(box["width"] / 499, box["height"] / 375) for box in (picture, heat)]
    assert scales[0] == pytest.approx(scales[1], rel=0.02)


def without_margins(shown, size):
    """The part of `shown` that a picture of this size takes, fitted into its middle."""
    scale = min(shown.width / size[0], shown.height / size[1])
    width, height = (round(scale * side) for side in size)
    left, top = (shown.width - width) // 2, (shown.height - height) // 2
    return shown.crop((left, top, left + width, top + height))


def test_the_page_says_what_its_model_is(page, run_folder):
    assert f"tiny ({run_folder})" in page.locator("h1").inner_text()
    page.get_by_text("Trained on the images of ").first.wait_for()
    page.get_by_text("It sees 96 x 96 pixels and tells 7 classes apart.").first.wait_for()
    page.get_by_text("Its 7 classes").click()
    listed = page.locator("#classes-list li")
    listed.nth(len(CLASSES) - 1).wait_for()  # it is filled once it is open
    assert listed.all_inner_texts() == CLASSES


def test_it_works_by_keyboard_alone(page):
    """From the top of the page, by tabs, to an example, and to the choice of a file."""
    focused = "() => (document.activeElement.ariaLabel || document.activeElement.innerText)"
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append((page.evaluate(focused) or "").strip())
        if reached[-1] in CLASSES:
            break
    assert reached[-1] in CLASSES, reached
    page.keyboard.press("Enter")
    assert len(shown_classes(page)) == 5
    page.reload()
    page.wait_for_selector("input[type=file]", state="attached")
    with page.expect_file_chooser(timeout=30_000) as chosen:
        for _ in range(40):
            page.keyboard.press("Tab")
            if "upload" in (page.evaluate(focused) or "").lower():
                page.keyboard.press("Enter")
                break
    chosen.value.set_files(str(PICTURE))
    assert len(shown_classes(page)) == 5


def test_pictures_are_described_in_words_and_fit_a_screen_400_pixels_wide(page):
    page.set_viewport_size({"width": 400, "height": 800})
    upload(page, PICTURE)
    picture_in(page, "heat"), picture_in(page, "seen")
    page.wait_for_function(  # six thumbnails
        "() => document.images.length === 9 && [...document.images].every(image => image.alt)"
    )
    assert page.locator("#heat .scale").get_attribute("aria-label").startswith("Colours of the")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    for part in page.locator("img, h1, figcaption, #classes dt, #examples button").all():
        box = part.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 400
        assert part.evaluate("part => part.scrollWidth <= part.clientWidth")


@pytest.mark.parametrize("after_an_example", [False, True])
def test_a_file_that_is_no_picture_is_reported_until_the_next_one(page, tmp_path, after_an_example):
    """After an example, Gradio has made the component for uploads anew."""
    if after_an_example:
        page.locator("#examples button").first.click()
        shown_classes(page)
    (tmp_path / "photo.jpg").write_text("not a picture")
    upload(page, tmp_path / "photo.jpg")
    problem = page.get_by_text("cannot be classified: cannot identify it as any of")
    problem.wait_for()
    assert page.locator("dd").count() == 0
    preview = page.locator("#picture img")
    page.wait_for_function("() => document.querySelector('#picture img').complete")
    assert not preview.is_visible()  # no icon of a broken image
    upload(page, PICTURE)
    assert len(shown_classes(page)) == 5
    assert problem.count() == 0 and preview.is_visible()


def test_each_picture_is_classified_once(page):
    """Uploaded, of an example, in place of another; and a removed one not at all."""
    asked = []
    page.on("request", lambda request: "/queue/join" in request.url and asked.append(request))

    def change(action):
        heat = page.locator("#heat img")
        before = heat.get_attribute("src") if heat.count() else None
        action()
        changed = "before => (document.querySelector('#heat img')?.src ?? null) != before"
        page.wait_for_function(changed, arg=before)
        page.wait_for_load_state("networkidle")

    change(lambda: upload(page, PICTURE))
    change(lambda: upload(page, ROTATED))
    change(lambda: page.locator("#examples button").nth(1).click())
    change(lambda: page.locator("#examples button").nth(2).click())
    change(lambda: upload(page, PICTURE))
    change(lambda: page.get_by_role("button", name="Remove Image").click())
    data = [request.post_data_json["data"] for request in asked]
    names = [Path(given[0]["path"]).name if given and given[0] else None for given in data]
    assert names == [PICTURE.name, ROTATED.name, None, None, PICTURE.name, None]
    assert data[2] == data[3] == []  # of an example, the server has the path
    assert page.locator("dd").count() == page.locator("#seen img").count() == 0


def test_examples_have_thumbnails_and_show_their_picture(page, run_folder):
    buttons = page.locator("#examples button")
    page.wait_for_function(
        "() => { const all = [...document.querySelectorAll('#examples img')];"
        " return all.length === 6 && all.every(image => image.naturalWidth) }"
    )
    assert buttons.all_inner_texts() == [CLASSES[i] for i in LABELS_OF_EXAMPLES]
    for image in page.locator("#examples img").all():
        assert image.evaluate("image => image.naturalWidth") == 192
        assert image.bounding_box()["width"] == image.bounding_box()["height"] == 96
    buttons.nth(3).click()
    heat = picture_in(page, "heat")
    examples = validation_examples(open_network(run_folder).config, CLASSES, 6)
    expected = look(Predictor(open_network(run_folder), backend="eager"), examples[3][0])
    np.testing.assert_allclose(np.asarray(heat, int), np.asarray(expected.heat, int), atol=1)
    page.wait_for_function(
        "name => document.querySelector('#picture img')?.src.endsWith(name)",
        arg=Path(examples[3][0]).name,
    )


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:{port}"},
        {"Host": "127.0.0.1:{port}", "Origin": "http://evil.example"},
    ],
)
def test_a_foreign_host_or_origin_is_refused_on_every_route(server, headers):
    headers = {name: value.format(port=server.port) for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    for method, path in ROUTES:
        assert answer_status(connection, method, path, headers) == 403, (method, path)
    for host in (f"127.0.0.1:{server.port}", f"localhost:{server.port}"):
        own = {"Host": host, "Origin": f"http://{host}"}
        assert answer_status(connection, "GET", "/config", own) == 200


def answer_status(connection, method, path, headers):
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    answer.read()
    return answer.status


def send(server, route, data, content_type="application/json"):
    """The answer to a POST: its text, and an error's as well."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    api = f"{server.address}/gradio_api/{route}"
    request = urllib.request.Request(api, body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return f"error {error.code}: {error.read().decode()}"


def get(server, path):
    try:
        with urllib.request.urlopen(f"{server.address}/{path}", timeout=60) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return f"error {error.code}"


def send_upload(server, path):
    """Upload a file; return its path in the folder of the server."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'
    body = head.encode() + path.read_bytes() + b"\r\n--x--\r\n"
    return json.loads(send(server, "upload", body, "multipart/form-data; boundary=x"))[0]


def answers(server, picture):
    """{route: answer} of all routes by which a program can name a picture to the two functions of
    the page: to classify one, and to show an example."""
    dependencies = json.loads(get(server, "config"))["dependencies"]
    functions = {one["api_name"]: one["id"] for one in dependencies}
    assert functions.keys() - {f"load_example_{i}" for i in range(1, 6)} == FUNCTIONS
    found = {}
    for name in FUNCTIONS:
        number = functions[name]
        call = {"data": [picture], "fn_index": number}
        for route in (f"run/{name}", f"api/{name}"):
            found[route] = send(server, route, call)
        for route in (f"call/{name}", f"call/v2/{name}"):
            given = {"picture": picture} if "v2" in route else call
            event = send(server, route, given)
            if "event_id" in event:
                event = get(server, f"gradio_api/{route}/{json.loads(event)['event_id']}")
            found[route] = event
        send(server, "queue/join", call | {"session_hash": f"{name}-test"})
        found[f"queue/{name}"] = get(server, f"gradio_api/queue/data?session_hash={name}-test")
    return found


FUNCTIONS = {"classify", "load_example"}  # of which the latter takes no picture
META = {"meta": {"_type": "gradio.FileData"}}
FORMS = {
    "no meta": lambda path: {"path": path},
    "meta": lambda path: {"path": path, **META},
    "stream": lambda path: {"path": path, "is_stream": True, **META},
    "url": lambda path: {"path": "nothing", "url": path, **META},
    "url alone": lambda path: {"url": path, **META},
    "list": lambda path: [{"path": path, **META}],
    "nested": lambda path: {"path": None, "url": [{"x": {"path": path, **META}}], **META},
}


@pytest.fixture(scope="module")
def others(server, tmp_path_factory):
    """Paths that a request may not name: of this user, of devices, of the network, by links."""
    (uploads,) = server.temporary.glob("replknet-page-*")
    own = tmp_path_factory.mktemp("own") / "own.jpg"
    shutil.copyfile(ROTATED, own)
    link = uploads / "link.jpg"
    link.symlink_to(own)
    (uploads / "folder").symlink_to(own.parent)
    return {
        "file": own,
        "device": "/dev/zero",
        "link": link,
        "folder link": uploads / "folder" / own.name,
        "dots": f"{uploads}/../../../{own}",
        "uploads": uploads,
        "address": "http://pictures.invalid/own.jpg",
        "hub": "https://huggingface.co/own.jpg",
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", ["file", "device", "link", "folder link", "dots", "uploads", "address", "hub"]
)
def test_a_request_cannot_name_what_was_not_uploaded(server, others, name, form):
    """Neither opened, nor copied to the uploads, nor fetched, which `serving` would see."""
    before = sorted(server.temporary.rglob("*"))
    for route, answer in answers(server, FORMS[form](str(others[name]))).items():
        is_answered = 'confidences": [{' in answer or "data:image/png" in answer
        assert not is_answered or (route.endswith("load_example") and form == "url alone"), route
    assert sorted(server.temporary.rglob("*")) == before
    assert get(server, f"gradio_api/file={others[name]}") == "error 403"


def test_an_uploaded_file_is_classified_by_every_route(server):
    picture = {"path": send_upload(server, PICTURE), **META}
    found = {
        route: text for route, text in answers(server, picture).items() if "example" not in route
    }
    assert found and all("data:image/png" in text for text in found.values()), found


def test_only_this_machine_reaches_it(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10):
        pass
    with pytest.raises(ConnectionRefusedError):  # another address of this machine
        socket.create_connection(("127.0.0.2", server.port), timeout=10)
