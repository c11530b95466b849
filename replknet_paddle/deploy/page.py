"""A web page for this machine alone: drop a picture, see its classes and where the network looks.

Gradio makes it (requirements/page.txt). Nothing is sent anywhere: no statistics of use, no public
link, no fonts or scripts from elsewhere; uploads lie in a folder that ends with the program, or is
removed by the next page where the program was killed. Only requests of the page itself are
answered: a page of another site can make a browser send requests to 127.0.0.1, under its own name
as Origin, or under a name of its own that it lets point to 127.0.0.1 (DNS rebinding), which is then
the Host. A request names files by their paths, and only uploaded ones are opened.
"""

import atexit
import base64
import contextlib
import fcntl
import glob
import html
import io
import os
import re
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from PIL import Image

from replknet_paddle.data.dataset import get_dataset
from replknet_paddle.data.lists import resolve
from replknet_paddle.data.transforms.image import to_rgb
from replknet_paddle.data.transforms.pipelines import EvalTransform
from replknet_paddle.deploy.backends import evaluation_mode
from replknet_paddle.deploy.drawing import HEAT_COLOURS, fitted, overlay
from replknet_paddle.deploy.images import decode
from replknet_paddle.deploy.predict import Predictor, probabilities
from replknet_paddle.model import RepLKNet
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.packages import import_extra
from replknet_paddle.zoo import find_record, is_published

ADDRESS = "127.0.0.1"
CLASSES_SHOWN = 5
EXAMPLES = 6
PICTURE_HEIGHT = 420  # pixels, of which Gradio's buttons take 42
LAST_STRIDE = 32  # pixels of the network's input for a position of its last stage
MAX_UPLOAD_BYTES = 200 * 2**20
ORIENTATION = 0x0112  # EXIF's entry; 1 is upright
SHOWN_PIXELS = (384, 1600)  # least and most of a heat map's longer side
THUMBNAIL_PIXELS = 96
UPLOADS = "replknet-page-{}-uploads"

# Browsers turn pictures as their EXIF data say; the network, as in evaluation, does not.
CSS = f"""
img {{ image-orientation: none !important; }}
h1, figcaption, #classes, #classes *, #classes-list {{ overflow-wrap: anywhere; }}
#picture img {{ object-fit: contain !important; width: 100%; height: 100%; }}
#classes-list ol {{ max-height: 16em; overflow-y: auto; }}
#heat figure, #seen figure {{ margin: 0; }}
#heat .html-container {{ padding: 0; }}
#heat img {{ width: 100%; max-height: {PICTURE_HEIGHT - 42}px; object-fit: contain; }}
#seen img {{ width: 100%; max-width: {SHOWN_PIXELS[0]}px; }}
#heat .scale {{
  height: 1em; background: linear-gradient(to right, transparent, {", ".join(HEAT_COLOURS)});
}}
#heat .ends {{ display: flex; justify-content: space-between; }}
#examples {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); }}
#examples button {{ flex-direction: column; white-space: normal; overflow-wrap: anywhere; }}
#examples img {{ width: {THUMBNAIL_PIXELS}px; height: {THUMBNAIL_PIXELS}px; margin: 0; }}
:focus-visible {{ outline: 3px solid #1a5fb4 !important; outline-offset: 2px; }}
"""
# Gradio gives the uploaded picture no description, and where a browser cannot show it, as a damaged
# file or a TIFF, a broken one.
SCRIPT = """() => {
  document.documentElement.lang = "en";
  const describe = () => document.querySelectorAll("#picture img").forEach((image) => {
    if (!image.alt) image.alt = "The picture to classify, as it is stored";
  });
  new MutationObserver(describe).observe(document.body, { childList: true, subtree: true });
  describe();
  for (const event of ["error", "load"])
    document.addEventListener(event, ({ target }) => {
      if (target.closest?.("#picture")) target.style.visibility = event === "error" ? "hidden" : "";
    }, true);
}"""
SCALE = (
    '<div class="scale" role="img" aria-label="Colours of the heat map, from no colour for nothing '
    'through dark violet and orange to light yellow for the most"></div>'
    '<div class="ends"><span>nothing speaks for it</span><span>the most</span></div>'
)


# ---- what the network makes of a picture


@dataclass(frozen=True)
class Look:
    """The network's answer for a picture, and where it looked."""

    classes: dict[str, float]  # probabilities, the largest first
    seen: np.ndarray  # what the network saw of the picture, (size, size, 3) uint8
    heat: Image.Image | None  # where it looked for the first class, over the whole picture
    is_cropped: bool  # whether it did not see all of the picture
    is_turned: bool  # whether the file asks to be shown turned, which the network does not do


def look(predictor: Predictor, path: str) -> Look:
    """Return the classes of a picture, and where the network looks, unless it is an export.
    InputError: it cannot be decoded, or the outputs are not finite."""
    image = decode(path)
    transform = predictor.transform
    array, seen, heat = transform(image)[None], transform.pixels(image), None
    network = predictor.backend.network
    if network is None:
        scores = predictor.scores(array)[0]
    else:
        logits, strengths = grad_cam(network, array)
        scores = probabilities(logits[None], predictor.backend)[0]
        if transform.image_size > LAST_STRIDE:  # else a single position
            heat = heat_over(to_rgb(image), strengths, transform)
    names = distinct(predictor.class_names)
    top = np.argsort(-scores, kind="stable")[:CLASSES_SHOWN]
    classes = {names[label]: float(scores[label]) for label in top}
    left, top, right, bottom = transform.region(*image.size)
    is_cropped = left > 0 or top > 0 or right < image.width or bottom < image.height
    is_turned = image.getexif().get(ORIENTATION, 1) != 1
    return Look(classes, seen, heat, is_cropped, is_turned)


def distinct(names: Sequence[str]) -> list[str]:
    """Return `names`, with their number where classes share a name, as two of ImageNet's do."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]


@paddle.no_grad()
def grad_cam(
    network: RepLKNet, image: np.ndarray, label: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of one image, and what speaks for a class where, by Grad-CAM (arXiv
    1610.02391) on the output of the last stage.

    Grad-CAM weighs each channel of a map by the mean, over positions, of the gradient of a class's
    logit, sums the channels and keeps what is positive (equations 1 and 2 of the paper). Behind the
    last stage there are only batch norm, a mean over positions and a linear layer here, so these
    gradients are the same for every image and are known: for channel k of a map of h x w positions,

        head.weight[k, class] * norm.weight[k] / sqrt(norm._variance[k] + epsilon) / (h * w)

    No backward pass is needed, and the map costs no more than the prediction.

    Args:
        network: a classifier; it is used in evaluation mode, and left in the mode it was in.
        image: (1, 3, H, W) float32, preprocessed.
        label: the class; None for the one with the largest logit.

    Returns:
        Logits (num_classes,), and the map (H / 32, W / 32), rounded up: float32, >= 0, in units of
        the logit; all zeros where nothing speaks for the class.
    """
    with evaluation_mode(network):
        features = network.forward_stages(paddle.to_tensor(image))[-1]  # (1, C, h, w)
        logits = network.forward_head(network.norm(features))[0]
    label = int(logits.argmax()) if label is None else label
    norm = network.norm
    scale = norm.weight / paddle.sqrt(norm._variance + norm._epsilon)
    positions = features.shape[2] * features.shape[3]
    weights = network.head.weight[:, label] * scale / positions  # (C,)
    heat = paddle.nn.functional.relu((features[0] * weights.reshape([-1, 1, 1])).sum(axis=0))
    return logits.numpy(), heat.numpy()


def heat_over(picture: Image.Image, heat: np.ndarray, transform: EvalTransform) -> Image.Image:
    """Return a picture, RGB, with the map of `grad_cam` over what the network saw of it, and the
    rest pale, at the picture's own resolution within `SHOWN_PIXELS`.

    All convolutions of stride 2 have odd kernels and the same padding on either side. So position i
    of the map is centred on the network's pixel 32 i, and the first one on the edge, not on the
    middle of 32 pixels. Between positions, strengths are interpolated linearly.
    """
    left, top, right, bottom = transform.region(*picture.size)
    longer = min(max(max(picture.size), SHOWN_PIXELS[0]), SHOWN_PIXELS[1])
    shown = fitted(picture, (longer, longer)) if longer != max(picture.size) else picture

    def along(length: int, shown_length: int, start: float, end: float, positions: int):
        """For each pixel shown along an axis: the weights of the positions, and whether the network
        saw it."""
        place = (np.arange(shown_length) + 0.5) * length / shown_length  # in the picture's pixels
        place = (place - start) / (end - start) * transform.image_size  # in the network's
        at = (place - 0.5) / LAST_STRIDE
        weights = [np.interp(at, np.arange(positions), one) for one in np.eye(positions)]
        return np.stack(weights, axis=1), (place >= 0) & (place < transform.image_size)

    rows, rows_seen = along(picture.height, shown.height, top, bottom, heat.shape[0])
    columns, columns_seen = along(picture.width, shown.width, left, right, heat.shape[1])
    strength = rows @ (heat / max(heat.max(), np.finfo(np.float32).tiny)) @ columns.T
    return overlay(shown, strength, rows_seen[:, None] & columns_seen)


def heat_html(result: Look) -> str:
    """Return the heat map of a `Look` with its description; nothing where there is none."""
    if result.heat is None:
        return ""
    first = html.escape(next(iter(result.classes)))
    alt = f"Heat map over the picture: where the network looks for {first}"
    caption = f"Where it looks for {first} (Grad-CAM)"
    if result.is_cropped:
        caption += "; the pale part lies outside its crop"
    return _figure(result.heat, alt, caption) + SCALE


def seen_html(result: Look) -> str:
    """Return what the network saw of the picture of a `Look`, with its description."""
    seen = fitted(Image.fromarray(result.seen), (SHOWN_PIXELS[0], SHOWN_PIXELS[0]))
    size = f"{result.seen.shape[1]} x {result.seen.shape[0]} pixels"
    kind = "resized and cropped" if result.is_cropped else "resized"
    parts = [_figure(seen, "The picture as the network sees it", f"{size}, {kind}")]
    if result.is_turned:
        parts.append(
            "<p>The file asks to be shown turned (its EXIF orientation). The network does not turn "
            "it, as in evaluation, so all pictures here are shown as they are stored.</p>"
        )
    return "".join(parts)


def _figure(picture: Image.Image, alt: str, caption: str) -> str:
    """Return a picture as a part of the page; `alt` and `caption` are HTML already."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{alt}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


# ---- what the page says of its model


def describe(model: str, predictor: Predictor) -> tuple[str, str]:
    """Return the name of an open model, which the user named as `model`, a path or a published
    name, and a sentence or two on its training and its input."""
    info = predictor.backend.info
    side = info.config.DATA.IMAGE_SIZE
    name = f"{info.config.MODEL.NAME} ({model})"
    if predictor.backend.network is None:
        digest = info.source_sha256
        source = f"a checkpoint with SHA-256 {digest[:16]}..." if digest else "a network in memory"
        origin = f"Exported from {source}"
    elif not is_published(model):
        origin = f"Trained on the images of {info.config.DATA.DATA_PATH}"
    else:
        record = find_record(model)
        name = record.name
        before = f"{record.pretrained_on}, then " if record.pretrained_on else ""
        data = "ImageNet-1K" if record.num_classes == 1000 else "ImageNet-22K"
        origin = f"Trained on {before}{data}"
    inputs = f"It sees {side} x {side} pixels and tells {predictor.num_classes:,} classes apart."
    return name, f"{origin}. {inputs}"


def validation_examples(
    config, class_names: Sequence[str], count: int
) -> list[tuple[str, str, Image.Image]]:
    """Return path, class and thumbnail of at most `count` validation images, evenly spread over the
    list."""
    try:
        dataset = get_dataset(config, is_train=False)
    except (InputError, OSError):  # a model is shown without its data
        return []
    examples = []
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int):
        path = dataset.path(int(index))
        with contextlib.suppress(InputError, OSError, UnicodeError):  # not to be read or shown
            full = resolve(dataset.root, path, allow_outside=dataset.allow_outside)
            full.encode()  # as Gradio does, which knows no other names
            examples.append((full, class_names[dataset.labels[index]], thumbnail(full)))
    return examples


def thumbnail(path: str) -> Image.Image:
    """Return the middle of a picture, square and small."""
    picture = to_rgb(decode(path))
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return fitted(square, (2 * THUMBNAIL_PIXELS, 2 * THUMBNAIL_PIXELS))  # for fine screens


# ---- the page


def import_gradio():
    """Return Gradio, without telemetry or requests to other machines."""
    if "gradio" not in sys.modules:  # which reads these when it is imported
        os.environ["GRADIO_TEMP_DIR"] = make_upload_folder()
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        os.environ["FASTAPI_OTEL_AUTO_CONFIGURE"] = "false"
    return import_extra("gradio", "page")


def make_upload_folder() -> str:
    """Return a new folder that ends with this process, and remove those of killed ones.

    A process holds a lock of its folder, which the system releases however the process ends.
    """
    for path in glob.glob(os.path.join(glob.escape(tempfile.gettempdir()), UPLOADS.format("*"))):
        with contextlib.suppress(OSError):  # locked by a living page, or not a folder
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(folder).st_uid == os.geteuid():
                    shutil.rmtree(path)
            finally:
                os.close(folder)
    new = tempfile.mkdtemp()
    with contextlib.suppress(OSError):  # without locks here, none is removed either
        fcntl.flock(os.open(new, os.O_RDONLY), fcntl.LOCK_EX)  # open as long as the process is
    path = os.path.join(os.path.dirname(new), UPLOADS.format(os.path.basename(new)))
    os.rename(new, path)  # only now do others find it
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def named_paths(data) -> Iterator[object]:
    """Yield what the dictionaries in the data of a request name as "path", at any depth."""
    if isinstance(data, dict):
        if data.get("path") is not None:
            yield data["path"]
        data = list(data.values())
    if isinstance(data, list):
        for value in data:
            yield from named_paths(value)


def build_page(model: str, predictor: Predictor):
    """Return the page of an open model, as `describe` has it, as an ASGI application."""
    gradio = import_gradio()
    name, origin = describe(model, predictor)
    network = predictor.backend.network
    names = predictor.class_names
    examples = []
    if network is not None and not is_published(model):
        examples = validation_examples(network.config, names, EXAMPLES)

    def classify(picture):
        if picture is None or picture["path"] is None:
            return None, "", ""
        try:
            result = look(predictor, picture["path"])
        except InputError as error:
            # Not gradio.Error, which would leave the classes of the picture before.
            reason = html.escape(str(error))
            return None, f'<p role="alert">This file cannot be classified: {reason}</p>', ""
        return result.classes, heat_html(result), seen_html(result)

    def loader(path: str):
        """Return the function of an example's button. It has no argument, for requests to give."""

        def load_example():
            return path, *classify({"path": path})

        return load_example

    class Page(gradio.Blocks):
        async def preprocess_data(self, block_fn, inputs, *rest, **named):
            """Refuse requests that name a file that was not uploaded. Gradio would copy or download
            most of them for its components: it checks them only in servers of its own."""
            folder = os.path.realpath(self.GRADIO_CACHE)
            for path in named_paths(inputs):
                if not os.path.realpath(path).startswith(folder + os.sep):
                    raise gradio.Error(
                        "allowed: files uploaded to this page", print_exception=False
                    )
            return await super().preprocess_data(block_fn, inputs, *rest, **named)

    with Page(title=f"RepLKNet: {name}", analytics_enabled=False) as page:
        title = re.sub("([_/-])", r"\1<wbr>", html.escape(name))  # where it may break
        gradio.HTML(f"<h1>{title}</h1><p>{html.escape(origin)}</p>")
        with gradio.Accordion(f"Its {len(names):,} classes", open=False):
            items = "".join(f"<li>{html.escape(name)}</li>" for name in names)
            listed = f'<ol start="0" tabindex="0" aria-label="Classes">{items}</ol>'
            gradio.HTML(listed, elem_id="classes-list")
        with gradio.Row():
            with gradio.Column():
                upload = gradio.Image(
                    label="Picture",
                    elem_id="picture",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=PICTURE_HEIGHT,
                )
                buttons = []
                if examples:
                    gradio.HTML("<p>Validation images, with their true classes:</p>")
                    with gradio.Row(elem_id="examples"):
                        for number, (_, class_name, small) in enumerate(examples):
                            icon = os.path.join(upload.GRADIO_CACHE, f"thumbnail_{number}.png")
                            os.makedirs(upload.GRADIO_CACHE, exist_ok=True)
                            small.save(icon)
                            buttons.append(gradio.Button(class_name, icon=icon, size="sm"))
            with gradio.Column():
                heat = gradio.HTML(elem_id="heat")
                classes = gradio.Label(
                    label="Classes", num_top_classes=CLASSES_SHOWN, elem_id="classes"
                )
                with gradio.Accordion("What the network sees", open=False):
                    seen = gradio.HTML(elem_id="seen")
        if network is None:
            gradio.Markdown(
                "An exported model gives no heat map; a checkpoint, a run folder or the name of a "
                "published model does."
            )
        elif predictor.transform.image_size <= LAST_STRIDE:
            gradio.Markdown(
                f"Pictures of {predictor.transform.image_size} pixels become a single position in "
                "the last stage: there is no heat map to show."
            )
        answer = [classes, heat, seen]
        options = {
            "show_progress": "minimal",
            "trigger_mode": "always_last",
            "concurrency_id": "classify",  # one picture at a time, in the order that they came
        }
        # The file as it came: Gradio's own preprocessing fails on what is not an image.
        gradio.on(
            [upload.upload, upload.clear], classify, upload, answer, preprocess=False, **options
        )
        for button, (path, *_) in zip(buttons, examples):
            copy = upload.move_resource_to_block_cache(path)  # others are not served
            load = loader(copy)
            button.click(load, None, [upload, *answer], api_visibility="private", **options)

    import fastapi

    return gradio.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        server_name=ADDRESS,
        footer_links=[],
        max_file_size=MAX_UPLOAD_BYTES,
        mcp_server=False,
        ssr_mode=False,
        show_error=False,
        run_history=False,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
        js=SCRIPT,
    )


# ---- its server


def reserve_port(port: int) -> socket.socket:
    """Return a socket that listens on a port of this machine."""
    try:
        return socket.create_server((ADDRESS, port))
    except OSError as error:
        raise InputError(
            f"port {port} of {ADDRESS} is not available ({os.strerror(error.errno)}): another "
            "program, perhaps another page, uses it; give another one by -port"
        ) from None


class OwnRequestsOnly:
    """An ASGI application that answers 403 to requests under a foreign Host or Origin, and to those
    for a file of another machine, which Gradio would fetch.

    Starlette's TrustedHostMiddleware checks no port and no Origin, and Gradio itself only withholds
    its answer from a foreign Origin, after it has done what was asked.
    """

    def __init__(self, app, port: int):
        self.app = app
        self.hosts = [f"{name}:{port}" for name in (ADDRESS, "localhost")]

    async def __call__(self, scope, receive, send) -> None:
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        app = self.app
        is_own = scope["type"] == "lifespan" or (
            self.is_own(Headers(scope=scope)) and "://" not in scope["path"]
        )
        if not is_own:
            app = PlainTextResponse("allowed: requests of this page, under its own address\n", 403)
        await app(scope, receive, send)

    def is_own(self, headers) -> bool:
        """Return whether there is one Host, and no Origin or one, and these are this page's."""
        hosts, origins = (
            [value.lower() for value in headers.getlist(name)] for name in ("host", "origin")
        )
        return hosts in [[host] for host in self.hosts] and (
            not origins or origins in [[f"http://{host}"] for host in self.hosts]
        )


def serve(app, listener: socket.socket) -> None:
    """Serve an ASGI application on a socket of `reserve_port` until Ctrl-C or SIGTERM."""
    import uvicorn

    port = listener.getsockname()[1]
    config = uvicorn.Config(
        OwnRequestsOnly(app, port), log_level="error", access_log=False, server_header=False
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # the command has its own

    print(f"http://{ADDRESS}:{port}  (Ctrl-C ends it)", flush=True)
    server.run(sockets=[listener])
