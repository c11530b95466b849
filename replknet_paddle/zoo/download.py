"""A published model's weights: from the cache, or downloaded, checked and converted.

The cache folder holds one safetensors file per model, under native names. A file has its name
there only when it is complete, and without a network it is all that is needed.

The download uses the standard library: `requests`, `pooch` and `paddle.utils.download` begin again
where a connection breaks.
"""

import contextlib
import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile
from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.checkpoints.load import load_state
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import cache_folder, file_sha256, locked
from replknet_paddle.runtime.progress import Bar
from replknet_paddle.zoo.records import PublishedModel

logger = logging.getLogger(__name__)

# Metadata entry of a converted file: SHA-256 of the file that it was made from.
_DIGEST_KEY = "source_sha256"

_CHUNK_BYTES = 2**20


def fetch(model: PublishedModel) -> Path:
    """Return the model's weights as a native file in the cache, which is filled if need be.

    The source is the first of these files in the cache folder, and a file that replaces it is
    converted anew:

    - `NAME.pth` or `NAME.pdparams`, which a person has put there;
    - the published file under its own name, if its hash is right. It is deleted once converted.

    If there is none and the model has not been converted, the file behind `model.url` is
    downloaded.

    Raises:
        InputError: no program can download it, the download failed, or the file is not the
            published one. The message says what to do by hand.
    """
    folder = cache_folder()
    converted = folder / f"{model.name}.safetensors"
    # Another process may convert the published file meanwhile, and delete it.
    with contextlib.suppress(FileNotFoundError):
        if _is_current(converted, _find_source(folder, model)):
            return converted
    folder.mkdir(parents=True, exist_ok=True)
    with locked(converted.with_suffix(".lock")):
        source = _find_source(folder, model)
        if _is_current(converted, source):
            return converted
        if source is None:
            source = _download_published(folder, model)
        digest, origin = file_sha256(source), source.name
        is_published = source.name == model.mmpretrain_file
        if is_published:
            origin = model.url
            if not digest.startswith(model.sha256_start):
                raise InputError(
                    f"{source}: its SHA-256 begins with {digest[: len(model.sha256_start)]} "
                    f"instead of {model.sha256_start}, so it is not the published file. Copy it "
                    "again, or delete it to have it downloaded; a file of your own is named "
                    f"{model.name}.pth"
                )
        metadata = {"model": model.name, "source": origin, _DIGEST_KEY: digest}
        write_safetensors(converted, load_state(source), metadata)
        if is_published:
            source.unlink()
    logger.info("%s is cached as %s", model.name, converted)
    return converted


def _find_source(folder: Path, model: PublishedModel) -> Path | None:
    names = [f"{model.name}.pth", f"{model.name}.pdparams", model.mmpretrain_file]
    return next((folder / name for name in names if name and (folder / name).exists()), None)


def _is_current(converted: Path, source: Path | None) -> bool:
    """Return whether the model has been converted, and from this source if there is one."""
    if source is None or not converted.exists():
        return converted.exists()
    return CheckpointFile(converted).metadata.get(_DIGEST_KEY) == file_sha256(source)


def _download_published(folder: Path, model: PublishedModel) -> Path:
    """Download the file behind `model.url`, or say what a person has to do."""
    if model.url is None:
        raise InputError(
            f"no program can download {model.name}. Download the PyTorch file from {model.page} "
            f"or the .pdparams file from {model.paddlevit_page} in a browser, and save it as "
            f"{folder / model.name}.pth or {folder / model.name}.pdparams"
        )
    path = folder / model.mmpretrain_file
    # Twice the weights in float32, and what a small model has beside them.
    max_bytes = 8 * model.parameters + 2**20
    download(model.url, path, sha256_start=model.sha256_start, max_bytes=max_bytes)
    return path


def download(
    url: str,
    path: Path,
    *,
    sha256_start: str,
    max_bytes: int,
    timeout_seconds: float = 30.0,
    attempts: int = 5,
    pause_seconds: float = 1.0,
) -> None:
    """Download `url` to `path`, going on where an earlier download broke off.

    Bytes arrive in `path` + '.part', which stays when the download fails and is continued by the
    next attempt or call. `path` appears when the file is whole and its SHA-256 begins as it should.
    The pause between two attempts doubles each time. InputError: the server refuses, the connection
    keeps failing, or the file is another one, or longer than `max_bytes`.
    """
    part = path.with_name(path.name + ".part")
    logger.info("downloading %s", url)
    for attempt in range(attempts):
        trouble = _continue_download(url, part, timeout_seconds, max_bytes)
        if trouble is None:
            break
        size = part.stat().st_size if part.exists() else 0
        if attempt == attempts - 1:
            raise InputError(
                f"{url}: {trouble} ({attempts} attempts). The {size} bytes that have arrived are "
                "kept: run the same command again to go on, or download the file in another "
                f"way to {path}"
            )
        logger.warning("%s: %s after %d bytes; trying again", url, trouble, size)
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


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only where it stays in the scheme, so that https is never left."""

    def redirect_request(self, request, answer, code, message, headers, url):
        if urlsplit(url).scheme != request.type:
            raise InputError(
                f"{request.full_url}: the server redirects to {url}; allowed: {request.type}"
            )
        return super().redirect_request(request, answer, code, message, headers, url)


def _continue_download(url: str, part: Path, timeout_seconds: float, max_bytes: int) -> str | None:
    """Append to `part` what it lacks of `url`; return what went wrong and may pass, or None."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        opener = urllib.request.build_opener(_SameScheme)
        response = opener.open(request, timeout=timeout_seconds)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing comes after `start`: it was whole, or is too long
            if error.headers.get("Content-Range") == f"bytes */{start}":
                return None
            part.unlink()
            return "an earlier download is longer than the file"
        answer = f"the server answers {error.code} {error.reason}"
        if error.code < 500 and error.code != 429:
            raise InputError(f"{url}: {answer}") from error
        return answer
    except (OSError, http.client.HTTPException) as error:
        return f"no connection ({getattr(error, 'reason', error)})"
    if response.status != 206:  # the server sends the whole file instead
        start = 0
    total = None if response.length is None else start + response.length
    with (
        response,
        open(part, "ab" if start else "wb", opener=_open_no_link) as file,
        Bar("download", total=total, unit="MB", per_unit=10**6) as bar,
    ):
        while True:
            if max(total or 0, file.tell()) > max_bytes:
                part.unlink()
                raise InputError(
                    f"{url}: more than {max_bytes} bytes, so it is not the published file; nothing "
                    "of it is kept"
                )
            try:
                chunk = response.read(_CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                return f"the connection broke ({error or type(error).__name__})"
            if not chunk:
                break
            file.write(chunk)
            bar.show(file.tell())
    if total is not None and part.stat().st_size < total:
        return f"the connection ended before byte {total}"
    return None
