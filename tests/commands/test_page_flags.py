"""The command line of the page: what it refuses, and what it opens."""

import socket
import sys

import pytest
from harness import free_ports, make_run
from tiny import command

main = command("page")
NEEDS_GRADIO = "Gradio is not installed (requirements/page.txt)"


@pytest.fixture
def port():
    return f"--port={free_ports(1)[0]}"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), image_size=96, classes=7)


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys, tmp_path, port):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main([str(tmp_path), port]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: this needs gradio")
    assert "requirements/page.txt" in error


@pytest.mark.parametrize("port", ["0", "-1", "65536"])
def test_a_port_that_there_is_not_is_refused(capsys, tmp_path, port):
    assert main([str(tmp_path), f"--port={port}"]) == 2
    assert capsys.readouterr().err == (
        f"error: --port is {port}; allowed: an integer from 1 to 65535\n"
    )


def test_a_model_that_there_is_not_is_refused(capsys, tmp_path, port):
    pytest.importorskip("gradio", reason=NEEDS_GRADIO)
    assert main([str(tmp_path / "nowhere"), port]) == 2
    assert capsys.readouterr().err.startswith(f"error: no model {tmp_path / 'nowhere'}; allowed: ")


@pytest.mark.parametrize("flag", ["-cfg=other.yaml", "--opts=SEED", "-opts=SEED"])
def test_an_export_takes_no_configuration(capsys, tmp_path, port, flag):
    pytest.importorskip("gradio", reason=NEEDS_GRADIO)
    (tmp_path / "export.json").write_text("{}")
    assert main([str(tmp_path), flag, port]) == 2
    assert "which is not a checkpoint or run folder; allowed" in capsys.readouterr().err


def test_a_checkpoint_takes_a_configuration(monkeypatch, run_folder, port):
    pytest.importorskip("gradio", reason=NEEDS_GRADIO)
    shown = []
    monkeypatch.setattr("replknet_paddle.deploy.page_server.serve", lambda *_, **__: None)
    monkeypatch.setattr(
        "replknet_paddle.deploy.page.build_page", lambda *given, **_: shown.append(given)
    )
    monkeypatch.setattr("replknet_paddle.commands.page.signal.signal", lambda *_: None)
    opts = ["-opts", "DATA.CROP_PCT", "0.5"]
    flags = ["-cfg", str(run_folder / "config.yaml"), *opts, port]
    assert main([str(run_folder), *flags]) == 0
    ((predictor, network, _),) = shown
    assert network.config.DATA.CROP_PCT == 0.5
    assert predictor.backend.info.config.DATA.CROP_PCT == 0.5


def test_a_port_in_use_is_reported_before_the_model_is_opened(capsys, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main([str(tmp_path / "no model"), f"--port={port}"]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: port {port} of 127.0.0.1 is not available (Address already in use)"
    )
