"""A web page for this machine alone: drop a picture, see its classes and where the network looks.

Gradio makes it (requirements/page.txt). Nothing is sent anywhere: no statistics of use, no public
link, no fonts or scripts from elsewhere; uploads lie in a folder that ends with the program.
"""

import atexit
import base64
import html
import io
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from replknet_paddle.deploy.gradcam import grad_cam
from replknet_paddle.deploy.images import decode
from replknet_paddle.deploy.page_facts import PageFacts
from replknet_paddle.deploy.pictures import HEAT_COLOURS, fitted, overlay
from replknet_paddle.deploy.predictor import Predictor, probabilities
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.packages import import_extra

CLASSES_SHOWN = 5
LAST_STRIDE = 32  # pixels of the network's input for a position of its last stage
MAX_UPLOAD_BYTES = 200 * 2**20
FONTS = ["system-ui", "sans-serif"]
ORIENTATION = 0x0112  # EXIF's entry; 1 is upright
SEEN_PIXELS = 384  # side of the pictures of what the network saw

# Browsers turn pictures as their EXIF data say; the network, as in evaluation, does not.
CSS = f"""
img {{ image-orientation: none !important; }}
#picture img {{ object-fit: contain !important; width: 100%; height: 100%; }}
#classes-list ol {{ max-height: 16em; overflow-y: auto; }}
#seen figure {{ margin: 0 0 1em; }}
#seen img {{ width: 100%; max-width: {SEEN_PIXELS}px; }}
#seen .scale {{
  height: 1em; max-width: {SEEN_PIXELS}px;
  background: linear-gradient(to right, transparent, {", ".join(HEAT_COLOURS)});
}}
#seen .ends {{ display: flex; justify-content: space-between; max-width: {SEEN_PIXELS}px; }}
:focus-visible {{ outline: 3px solid #1a5fb4 !important; outline-offset: 2px; }}
"""
# Gradio gives the uploaded picture no description.
SCRIPT = """() => {
  document.documentElement.lang = "en";
  const describe = () => document.querySelectorAll("#picture img").forEach((image) => {
    if (!image.alt) image.alt = "The picture to classify, as it is stored";
  });
  new MutationObserver(describe).observe(document.body, { childList: true, subtree: true });
  describe();
}"""


def import_gradio():
    """Gradio, without telemetry or requests to other machines.

    Raises:
        InputError: it is not installed.
    """
    if "gradio" not in sys.modules:  # which reads these when it is imported
        uploads = tempfile.mkdtemp(prefix="replknet-page-")
        atexit.register(shutil.rmtree, uploads, ignore_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = uploads
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    return import_extra("gradio", "page")


def distinct(names: Sequence[str]) -> list[str]:
    """`names`, with their number where several classes have one name, as two of ImageNet's do."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]


@dataclass(frozen=True)
class Look:
    """What the network makes of a picture.

    Attributes:
        classes: {class: probability}, the most probable one first.
        seen: what the network saw of it, (size, size, 3) uint8.
        heat: where it looked for the first class, over `seen`; None without a network.
        is_turned: whether the file asks to be shown turned, which the network does not do.
    """

    classes: dict[str, float]
    seen: np.ndarray
    heat: Image.Image | None
    is_turned: bool


def look(predictor: Predictor, network, path: str) -> Look:
    """Classify a picture, and see where the network looks.

    Args:
        predictor: of the network.
        network: the same as a `replknet.RepLKNet`, for the heat map; None for none.
        path: of a picture.

    Raises:
        InputError: it cannot be decoded, or the network's outputs are not finite.
    """
    image = decode(path)
    array = predictor.transform(image)[None]
    seen, heat = predictor.transform.pixels(image), None
    if network is None:
        scores = predictor.scores(array)[0]
    else:
        logits, strengths = grad_cam(network, array)
        scores = probabilities(logits[None], "dygraph")[0]
        if predictor.transform.image_size > LAST_STRIDE:  # else a single position
            heat = overlay(seen, strengths)
    names = distinct(predictor.class_names)
    top = np.argsort(-scores, kind="stable")[:CLASSES_SHOWN]
    return Look(
        {names[label]: float(scores[label]) for label in top},
        seen,
        heat,
        image.getexif().get(ORIENTATION, 1) != 1,
    )


def seen_html(result: Look) -> str:
    """The pictures of a `Look` with their descriptions, as HTML."""
    first = html.escape(next(iter(result.classes)), quote=True)
    seen = fitted(Image.fromarray(result.seen), (SEEN_PIXELS, SEEN_PIXELS))
    parts = [
        figure(seen, "The picture as the network sees it, resized and cropped", "What it sees")
    ]
    if result.is_turned:
        parts.append(
            "<p>The file asks to be shown turned (its EXIF orientation). The network does not turn "
            "it, as in evaluation, so all pictures here are shown as they are stored.</p>"
        )
    if result.heat is not None:
        alt = f"Heat map over the same picture: where the network looks for {first}"
        parts.append(figure(result.heat, alt, f"Where it looks for {first} (Grad-CAM)"))
        parts.append(
            '<div class="scale" role="img" aria-label="Colours of the heat map, from no colour '
            'for nothing through dark violet and orange to light yellow for the most"></div>'
            '<div class="ends"><span>nothing speaks for it</span><span>the most</span></div>'
        )
    return "".join(parts)


def figure(picture: Image.Image, alt: str, caption: str) -> str:
    """A picture in a page; `alt` and `caption` are HTML already."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{alt}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def note_of(predictor: Predictor, network) -> str | None:
    """Why there is no heat map; None where there is one."""
    if network is None:
        return (
            "An exported model gives no heat map; a checkpoint, a run folder or the name of a "
            "published model does."
        )
    if predictor.transform.image_size <= LAST_STRIDE:
        return (
            f"Pictures of {predictor.transform.image_size} pixels become a single position in the "
            "last stage: there is no heat map to show."
        )
    return None


def uploaded(payload, folder: str) -> str | None:
    """The file that a request names, which must be one that came by the page.

    Gradio checks only some of the forms in which a request can name a file.

    Args:
        payload: Gradio's data of an image, or None.
        folder: where Gradio puts uploads.

    Raises:
        gradio.Error: it lies elsewhere.
    """
    if payload is None or payload.path is None:
        return None
    path, folder = os.path.realpath(payload.path), os.path.realpath(folder)
    if not path.startswith(folder + os.sep):
        raise import_gradio().Error("allowed: files uploaded to this page", print_exception=False)
    return path


def build_page(predictor: Predictor, network, facts: PageFacts):
    """The page, as an ASGI application.

    Args:
        predictor, network: as of `look`.
        facts: what it says of the model.

    Raises:
        InputError: Gradio is not installed.
    """
    gradio = import_gradio()

    def classify(path):
        if path is None:
            return None, ""
        try:
            result = look(predictor, network, path)
        except InputError as error:
            # Not gradio.Error, which would leave the classes of the picture before.
            gradio.Warning(f"This file cannot be classified: {error}", duration=None)
            return None, ""
        return result.classes, seen_html(result)

    with gradio.Blocks(title=f"RepLKNet: {facts.name}", analytics_enabled=False) as page:
        gradio.HTML(f"<h1>{html.escape(facts.name)}</h1><p>{html.escape(facts.trained_on)}</p>")
        with gradio.Accordion(f"Its {len(facts.class_names):,} classes", open=False):
            items = "".join(f"<li>{html.escape(name)}</li>" for name in facts.class_names)
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
                    height=420,
                )
                # The file as it came: Gradio's own way fails on what is not an image. (A derived
                # class would make Gradio write a .pyi file beside this one.)
                upload.preprocess = lambda payload: uploaded(payload, upload.GRADIO_CACHE)
                if facts.examples:
                    gradio.Examples(
                        [[example.path] for example in facts.examples],
                        upload,
                        label="Validation images, with their true classes",
                        example_labels=[example.class_name for example in facts.examples],
                        api_visibility="private",
                    )
            with gradio.Column():
                classes = gradio.Label(label="Classes", num_top_classes=CLASSES_SHOWN)
                seen = gradio.HTML(elem_id="seen")
        note = note_of(predictor, network)
        if note is not None:
            gradio.Markdown(note)
        upload.change(classify, upload, [classes, seen], show_progress="minimal")

    import fastapi

    return gradio.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        server_name="127.0.0.1",
        footer_links=[],
        max_file_size=MAX_UPLOAD_BYTES,
        ssr_mode=False,
        show_error=False,
        run_history=False,
        theme=gradio.themes.Default(font=FONTS, font_mono=["monospace"]),
        css=CSS,
        js=SCRIPT,
    )
