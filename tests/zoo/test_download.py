"""Downloads, against an HTTP server of the test's own that can misbehave in every usual way."""

import contextlib
import hashlib
import os
import shutil
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from harness import Run

from replknet_paddle import zoo
from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile
from replknet_paddle.checkpoints.files import (
    write_pdparams,
    write_safetensors,
)
from replknet_paddle.checkpoints.load import load_state
from replknet_paddle.runtime import files, progress
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import CACHE_VARIABLE
from replknet_paddle.zoo.download import download, fetch
from replknet_paddle.zoo.records import PublishedModel

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
CONTENT = (FIXTURES / "tiny31_mmpretrain.pth").read_bytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
TIMES = {"timeout_seconds": 0.5, "pause_seconds": 0.01}
LIMITS = {**TIMES, "max_bytes": len(CONTENT)}


class Server:
    """Serves CONTENT under any path; `behaviours` are used up, one for each request.

    'whole' is the last of them for good; 'cut' ends the connection in the middle; 'stall' stops
    sending there; 'no ranges' ignores the Range header; a number is an HTTP status; 'other' is
    another file of the same size; 'long' has no end, 'says long' states a length that is too large;
    a URL is redirected to.
    """

    def __init__(self):
        self.behaviours: list = []
        self.requests: list[str | None] = []  # the Range header of each
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.headers.get("Range"))
                behaviour = server.behaviours.pop(0) if server.behaviours else "whole"
                with contextlib.suppress(ConnectionError):
                    server.answer(self, behaviour)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/tiny-deadbeef.pth"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, handler, behaviour) -> None:
        if isinstance(behaviour, int):
            handler.send_error(behaviour)
            return
        if behaviour in ("long", "says long"):
            handler.send_response(200)
            if behaviour == "says long":
                handler.send_header("Content-Length", str(len(CONTENT) + 1))
            handler.end_headers()
            while behaviour == "long":  # until nobody listens
                handler.wfile.write(CONTENT)
            return
        if ":" in behaviour:
            handler.send_response(302)
            handler.send_header("Location", behaviour)
            handler.end_headers()
            return
        asked = handler.headers.get("Range") if behaviour != "no ranges" else None
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        rest = (CONTENT[::-1] if behaviour == "other" else CONTENT)[start:]
        handler.send_response(200 if not start else 206 if rest else 416)
        if start and not rest:
            handler.send_header("Content-Range", f"bytes */{len(CONTENT)}")
        handler.send_header("Content-Length", str(len(rest)))
        handler.end_headers()
        handler.wfile.write(rest[: len(rest) // 2] if behaviour in ("cut", "stall") else rest)
        handler.wfile.flush()
        if behaviour == "stall":
            time.sleep(1)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "file.pth"


HALF = f"bytes={len(CONTENT) // 2}-"


@pytest.mark.parametrize(
    "part, behaviours, requests",
    [
        (None, ["whole"], [None]),
        (None, ["cut", "whole"], [None, HALF]),
        (None, ["cut", "stall"], [None, HALF]),
        (None, ["cut", 503], [None, HALF, HALF]),
        (None, ["cut", 429], [None, HALF, HALF]),
        (None, ["cut", "no ranges"], [None, HALF]),
        (CONTENT, [], [f"bytes={len(CONTENT)}-"]),
        (CONTENT + b"more", [], [f"bytes={len(CONTENT) + 4}-", None]),
    ],
)
def test_a_download_goes_on_until_the_file_is_whole(
    part, behaviours, requests, server, target, capfd, monkeypatch
):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    server.behaviours = behaviours
    if part is not None:
        target.with_name("file.pth.part").write_bytes(part)
    download(server.url, target, sha256_start=SHA256, **LIMITS)
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert server.requests[: len(requests)] == requests
    out, shown = capfd.readouterr()
    assert part is not None or "download: 100 %, 0.5/0.5 MB" in shown
    assert out == ""


def test_an_interrupted_download_is_resumed_by_the_next_call(server, target):
    server.behaviours = ["cut", "cut"]
    with pytest.raises(InputError, match="run the same command again") as caught:
        download(server.url, target, sha256_start=SHA256, attempts=2, **LIMITS)
    assert not target.exists()
    kept = target.with_name("file.pth.part").stat().st_size
    assert str(kept) in str(caught.value) and 0 < kept < len(CONTENT)
    download(server.url, target, sha256_start=SHA256, **LIMITS)
    assert target.read_bytes() == CONTENT and server.requests[-1] == f"bytes={kept}-"


@pytest.mark.parametrize(
    "part, behaviours, says",
    [
        (None, ["other"], f"instead of {SHA256[:8]}, so it is not the published file"),
        (CONTENT[::-1][:1000], [], "so it is not the published file"),
        (None, [404], "the server answers 404"),
    ],
)
def test_a_wrong_file_is_refused_at_once_and_deleted(part, behaviours, says, server, target):
    server.behaviours = behaviours
    if part is not None:
        target.with_name("file.pth.part").write_bytes(part)
    with pytest.raises(InputError, match=says):
        download(server.url, target, sha256_start=SHA256[:8], **LIMITS)
    assert len(server.requests) == 1 and list(target.parent.iterdir()) == []


def test_a_link_in_the_place_of_a_part_is_not_followed(server, target, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    target.with_name("file.pth.part").symlink_to(victim)
    server.behaviours = ["no ranges"]
    with pytest.raises(OSError, match="file.pth.part"):
        download(server.url, target, sha256_start=SHA256, **LIMITS)
    assert victim.read_text() == "theirs"


@pytest.mark.parametrize("behaviour", ["long", "says long"])
def test_a_file_longer_than_the_published_one_is_not_stored(behaviour, server, target):
    server.behaviours = [behaviour]
    with pytest.raises(InputError, match=f"more than {len(CONTENT)} bytes"):
        download(server.url, target, sha256_start=SHA256, **LIMITS)
    assert len(server.requests) == 1 and list(target.parent.iterdir()) == []


def test_a_redirect_stays_in_its_scheme(server, target):
    server.behaviours = [server.url.replace("tiny", "moved")]
    download(server.url, target, sha256_start=SHA256, **LIMITS)
    assert target.read_bytes() == CONTENT
    target.unlink()
    for place in (f"file://{FIXTURES}/tiny31_mmpretrain.pth", "ftp://127.0.0.1:1/a", "https://a/b"):
        server.behaviours = [place]
        with pytest.raises(InputError, match=f"[Rr]edirect.* to .*{place}"):
            download(server.url, target, sha256_start=SHA256, **LIMITS)
        assert list(target.parent.iterdir()) == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate by openssl")
def test_no_redirect_leaves_https(server, target, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("certificate")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key", "-out"]
    made += [
        "cert",
        "-days",
        "2",
        "-subj",
        "/CN=127.0.0.1",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    subprocess.run(made, cwd=folder, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "cert"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert", folder / "key")
    secure = Server()
    secure.http.socket = context.wrap_socket(secure.http.socket, server_side=True)
    url = secure.url.replace("http", "https")
    download(url, target, sha256_start=SHA256, **LIMITS)
    secure.behaviours = [server.url]
    with pytest.raises(InputError, match=f"redirects to {server.url}; allowed: https"):
        download(url, target.with_name("other"), sha256_start=SHA256, **LIMITS)
    assert server.requests == []
    secure.http.shutdown()
    secure.http.server_close()


def test_no_server(server, target):
    server.http.server_close()
    with pytest.raises(InputError, match=r"no connection \(.*refused.*download the file in"):
        download(server.url, target, sha256_start=SHA256, attempts=2, **LIMITS)


# The cache


@pytest.fixture
def published(server, config_file, tmp_path, monkeypatch):
    """A published model whose file is on the server; and an empty cache."""

    class Published(PublishedModel):
        url = server.url
        sha256_start = SHA256[:8]

    model = Published(
        "tiny31",
        str(config_file("tiny31")),
        None,
        64,
        10,
        200_000,
        0,
        (),
        "id",
        "id",
        "tiny31_3rdparty_20221118-deadbeef.pth",
    )
    monkeypatch.setattr(zoo, "MODELS", (model,))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return model


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")


def test_model_is_downloaded_once_then_works_offline(published, server, tmp_path):
    first = zoo.get_model("tiny31_3rdparty", pretrained=True)
    assert cached(tmp_path) == ["tiny31.safetensors"]
    server.http.shutdown()
    server.http.server_close()
    second = zoo.get_model("tiny31", pretrained=True)
    assert len(server.requests) == 1
    for name, value in load_state(FIXTURES / "tiny31_mmpretrain.pth").items():
        np.testing.assert_array_equal(first.state_dict()[name].numpy(), value)
        np.testing.assert_array_equal(second.state_dict()[name].numpy(), value)


def test_cached_file_says_where_it_came_from(published, server):
    metadata = CheckpointFile(fetch(published)).metadata
    assert metadata == {"model": "tiny31", "source": server.url, "source_sha256": SHA256}


def test_file_put_into_the_cache_by_hand(published, server, tmp_path):
    place(tmp_path, "tiny31.pth", CONTENT)
    zoo.get_model("tiny31", pretrained=True)
    assert server.requests == []
    assert cached(tmp_path) == ["tiny31.pth", "tiny31.safetensors"]
    metadata = CheckpointFile(fetch(published)).metadata
    assert metadata == {"model": "tiny31", "source": "tiny31.pth", "source_sha256": SHA256}


def place(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / "cache" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def head_bias(path: Path) -> np.ndarray:
    return load_state(path)["head.bias"]


def test_file_by_hand_under_the_published_name_is_checked_first(published, server, tmp_path):
    """Even where it would load: here it is another file with weights of the same network."""
    other = (FIXTURES / "tiny31_official.pth").read_bytes()
    path = place(tmp_path, published.mmpretrain_file, other)
    with pytest.raises(InputError) as caught:
        fetch(published)
    found = hashlib.sha256(other).hexdigest()[:8]
    assert str(caught.value).startswith(f"{path}: its SHA-256 begins with {found} instead of")
    assert path.read_bytes() == other and cached(tmp_path) == [path.name]
    path.write_bytes(CONTENT)
    fetch(published)
    assert server.requests == [] and cached(tmp_path) == ["tiny31.safetensors"]


def test_corrected_file_replaces_what_was_converted(published, server, tmp_path):
    """Whatever its time says; and an unchanged one is not converted again."""
    right = load_state(FIXTURES / "tiny31_official.pth")
    wrong = {**right, "head.bias": right["head.bias"] + np.float32(1)}
    source = tmp_path / "cache" / "tiny31.pdparams"
    source.parent.mkdir()
    write_pdparams(source, wrong)
    converted = fetch(published)
    np.testing.assert_array_equal(head_bias(converted), wrong["head.bias"])
    when = converted.stat().st_mtime_ns
    assert fetch(published).stat().st_mtime_ns == when

    write_pdparams(source, right)
    os.utime(source, (0, 0))
    np.testing.assert_array_equal(head_bias(fetch(published)), right["head.bias"])
    source.unlink()
    np.testing.assert_array_equal(head_bias(fetch(published)), right["head.bias"])
    assert server.requests == []


def test_file_by_hand_replaces_a_download_and_a_conversion_of_older_versions(published, tmp_path):
    state = load_state(FIXTURES / "tiny31_official.pth")
    state["head.bias"] = state["head.bias"] * np.float32(2)
    for metadata in ({"model": "tiny31", "source": "url", "source_sha256": SHA256}, {}):
        write_safetensors(place(tmp_path, "tiny31.safetensors", b""), state, metadata)
        np.testing.assert_array_equal(head_bias(fetch(published)), state["head.bias"])
    place(tmp_path, "tiny31.pth", CONTENT)
    np.testing.assert_array_equal(head_bias(fetch(published)), state["head.bias"] / np.float32(2))


def test_finished_download_is_not_repeated_after_a_crash(published, server, tmp_path):
    place(tmp_path, published.mmpretrain_file, CONTENT)
    fetch(published)
    assert server.requests == [] and cached(tmp_path) == ["tiny31.safetensors"]


def test_model_without_a_direct_link_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    with pytest.raises(InputError) as caught:
        zoo.get_model("replknet-31b-22k", pretrained=True)
    message = str(caught.value)
    assert "https://drive.google.com/file/d/1PYJiMszZYNrkZOeYwjccvxX8UHMALB7z" in message
    assert "https://drive.google.com/file/d/1uoQ9chuwOgKAnYxXzK0Tn0Euka7NoR5q" in message
    assert str(tmp_path / "cache" / "replknet-31b-22k.pth") in message


def fetch_published(arguments) -> int:
    """In a process of its own: print the path of the file that is found at a URL."""
    name, url, sha256, file = arguments

    class Published(PublishedModel):
        pass

    Published.url, Published.sha256_start = url, sha256
    print(fetch(Published(name, "x", None, 64, 10, 0, 0, (), "", "", file)))
    return 0


@pytest.mark.skipif(files.fcntl is None, reason="processes are kept apart by POSIX locks")
def test_processes_that_ask_at_once_download_once(published, server, tmp_path):
    arguments = [published.name, server.url, SHA256, published.mmpretrain_file]
    runs = [
        Run(
            arguments,
            output=tmp_path / f"{i}.txt",
            target=fetch_published,
            environment={CACHE_VARIABLE: str(tmp_path / "cache")},
        )
        for i in range(3)
    ]
    assert [run.wait() for run in runs] == [0, 0, 0], [run.text() for run in runs]
    answers = {run.text().splitlines()[-1] for run in runs}
    assert answers == {str(tmp_path / "cache" / "tiny31.safetensors")}
    assert len(server.requests) == 1
