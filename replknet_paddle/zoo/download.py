"""Getting a published model's weights: from the cache, or downloaded, checked and converted.

The cache folder is `~/.cache/replknet_paddle`, or the one that the environment variable
`REPLKNET_PADDLE_CACHE` names. It holds one safetensors file per model, under native names; a file
there is complete, because it got its name only after it was. Without a network it is all that
is needed.
"""

import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from replknet_paddle.checkpoints.convert import load_state
from replknet_paddle.checkpoints.writers import write_safetensors
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import cache_folder, file_sha256, locked
from replknet_paddle.zoo.records import PublishedModel

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 2**20


class _Interrupted(Exception):
    """The connection failed before the end; what arrived is kept."""


def fetch(model: PublishedModel) -> Path:
    """The model's weights as a native safetensors file in the cache, which is filled if need be.

    A file that a person has put into the cache folder as `<name>.pth` or `<name>.pdparams` is
    converted; else the file behind `model.url` is downloaded.

    Raises:
        InputError: it cannot be downloaded by a program, the download failed, or the file is not
            the published one. The message says what to do by hand.
    """
    folder = cache_folder()
    converted = folder / f"{model.name}.safetensors"
    if converted.exists():
        return converted
    folder.mkdir(parents=True, exist_ok=True)
    with locked(converted.with_suffix(".lock")):
        if converted.exists():
            return converted
        by_hand = [folder / f"{model.name}{suffix}" for suffix in (".pth", ".pdparams")]
        source = next((path for path in by_hand if path.exists()), None)
        if source is None and model.url is None:
            raise InputError(
                f"{model.name} cannot be downloaded by a program. Download the PyTorch file from "
                f"{model.page} or the .pdparams file from {model.paddlevit_page} in a browser, and "
                f"save it as {by_hand[0]} or {by_hand[1]}"
            )
        downloaded = source is None
        if downloaded:
            source = folder / model.mmpretrain_file
            if not source.exists():
                download(model.url, source, sha256_start=model.sha256_start)
        write_safetensors(
            converted, load_state(source), {"model": model.name, "source": model.url or source.name}
        )
        if downloaded:
            source.unlink()
    logger.info("%s is cached as %s", model.name, converted)
    return converted


def download(
    url: str,
    path: Path,
    *,
    sha256_start: str,
    timeout_seconds: float = 30.0,
    attempts: int = 5,
    pause_seconds: float = 1.0,
) -> None:
    """Download `url` to `path`, going on where an earlier download broke off.

    Bytes arrive in `path` + '.part', which stays when the download fails and is continued by the
    next attempt or call. `path` appears when the file is whole and its hash right.

    Args:
        url: http or https.
        path: where to put it; its folder exists.
        sha256_start: the first hex digits of the right file's SHA-256.
        timeout_seconds: longest silence of the server.
        attempts: how often to connect; each continues the one before.
        pause_seconds: before the second attempt; doubles from then on.

    Raises:
        InputError: the server refuses, the connection keeps failing, or the file is another one.
    """
    part = path.with_name(path.name + ".part")
    for attempt in range(attempts):
        try:
            _continue_download(url, part, timeout_seconds)
            break
        except _Interrupted as error:
            size = part.stat().st_size if part.exists() else 0
            if attempt == attempts - 1:
                raise InputError(
                    f"{url}: {error} ({attempts} attempts). The {size} bytes that have arrived are "
                    "kept: run the same command again to go on, or download the file in another "
                    f"way to {path}"
                ) from error
            logger.warning("%s: %s after %d bytes; trying again", url, error, size)
            time.sleep(pause_seconds * 2**attempt)
    found = file_sha256(part)
    if not found.startswith(sha256_start):
        part.unlink()
        raise InputError(
            f"{url}: its SHA-256 begins with {found[: len(sha256_start)]} instead of "
            f"{sha256_start}, so it is not the published file; it has been deleted. "
            "Try again, and if that gives the same, look for a proxy in between"
        )
    os.replace(part, path)


def _continue_download(url: str, part: Path, timeout_seconds: float) -> None:
    """Append to `part` what it lacks of `url`.

    Raises:
        _Interrupted: the connection broke, or brought less than announced.
        InputError: the server has no such file.
    """
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout_seconds)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing comes after `start`: it was whole, or is too long
            if error.headers.get("Content-Range") != f"bytes */{start}":
                part.unlink()
                raise _Interrupted("an earlier download is longer than the file") from error
            return
        if error.code >= 500 or error.code == 429:
            raise _Interrupted(f"the server answers {error.code} {error.reason}") from error
        raise InputError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(f"no connection ({getattr(error, 'reason', error)})") from error
    with response:
        if start and response.status != 206:  # the server sends the whole file instead
            start = 0
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdigit() else None
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(
                total=total,
                initial=start,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                desc=part.stem,
            ) as bar,
        ):
            while chunk := _receive(response):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size < total:
        raise _Interrupted(f"the connection ended before byte {total}")


def _receive(response) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(f"the connection broke ({error or type(error).__name__})") from error
