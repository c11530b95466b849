"""A web page for this machine alone: drop a picture, see its classes and where the network looks.

Gradio serves it (requirements/page.txt). Nothing is sent anywhere: no statistics of use, no public
link, no fonts or scripts from elsewhere; uploads lie in a folder that ends with the program.
"""

import atexit
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence

import numpy as np

from replknet_paddle.deploy.gradcam import grad_cam
from replknet_paddle.deploy.images import decode
from replknet_paddle.deploy.pictures import overlay
from replknet_paddle.deploy.predictor import Predictor, probabilities
from replknet_paddle.runtime.errors import InputError

ADDRESS = "127.0.0.1"
CLASSES_SHOWN = 5
LAST_STRIDE = 32  # pixels of the network's input for a position of its last stage
MAX_UPLOAD_BYTES = 200 * 2**20
FONTS = ["system-ui", "sans-serif"]


def import_gradio():
    """Gradio, told to keep to itself.

    Raises:
        InputError: it is not installed.
    """
    if "gradio" not in sys.modules:  # which reads these when it is imported
        uploads = tempfile.mkdtemp(prefix="replknet-page-")
        atexit.register(shutil.rmtree, uploads, ignore_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = uploads
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise InputError(
            f"the page needs Gradio ({error}); pip install -r requirements/page.txt"
        ) from None
    return gradio


def distinct(names: Sequence[str]) -> list[str]:
    """`names`, with their number where several classes have one name, as two of ImageNet's do."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def look(predictor: Predictor, network, path: str):
    """Probabilities {class: probability} of the most probable classes, and a heat map or None.

    Args:
        predictor: of the network.
        network: the same as a `replknet.RepLKNet`, for the heat map; None for none.
        path: of a picture.

    Raises:
        InputError: it cannot be decoded, or the network gives no numbers.
    """
    image = decode(path)
    array = predictor.transform(image)[None]
    if network is None:
        scores, heat = predictor.scores(array)[0], None
    else:
        logits, heat = grad_cam(network, array)
        scores = probabilities(logits[None], "dygraph")[0]
        heat = overlay(predictor.transform.pixels(image), heat)
    names = distinct(predictor.class_names)
    top = np.argsort(-scores, kind="stable")[:CLASSES_SHOWN]
    return {names[label]: float(scores[label]) for label in top}, heat


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


def build_page(predictor: Predictor, network, *, title: str):
    """The page, as a Gradio app; its arguments are those of `look`.

    Raises:
        InputError: Gradio is not installed.
    """
    gradio = import_gradio()
    note = None
    if network is None:
        note = (
            "An exported model gives no heat map; a checkpoint, a run folder or the name of a "
            "published model does."
        )
    elif predictor.transform.image_size <= LAST_STRIDE:
        network = None
        note = (
            f"Pictures of {predictor.transform.image_size} pixels become a single position in the "
            "last stage: there is no heat map to show."
        )

    def classify(path):
        if path is None:
            return None, None
        try:
            return look(predictor, network, path)
        except InputError as error:
            # Not gradio.Error, which would leave the classes of the picture before.
            gradio.Warning(f"This file cannot be classified: {error}", duration=None)
            return None, None

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            with gradio.Column():
                upload = gradio.Image(
                    label="Picture",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=420,
                )
                # The file as it came: Gradio's own way stumbles over what is no image. (A derived
                # class would make Gradio write a .pyi file beside this one.)
                upload.preprocess = lambda payload: uploaded(payload, upload.GRADIO_CACHE)
            with gradio.Column():
                classes = gradio.Label(label="Classes", num_top_classes=CLASSES_SHOWN)
                heat = gradio.Image(
                    label="Where the network looks for the first of them",
                    visible=network is not None,
                    interactive=False,
                    buttons=["fullscreen"],
                    format="png",
                    height=420,
                )
        if note is not None:
            gradio.Markdown(note)
        upload.change(classify, upload, [classes, heat], show_progress="minimal")
    return page


def serve(page, *, port: int) -> None:
    """Serve `page` on this machine until Ctrl-C.

    Raises:
        InputError: the port is taken.
    """
    gradio = import_gradio()
    try:
        page.launch(
            server_name=ADDRESS,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            max_file_size=MAX_UPLOAD_BYTES,
            ssr_mode=False,
            theme=gradio.themes.Default(font=FONTS, font_mono=["monospace"]),
        )
    except OSError as error:
        raise InputError(f"cannot serve on port {port} of {ADDRESS}: {error}") from None
    print(f"http://{ADDRESS}:{page.server_port}  (Ctrl-C ends it)", flush=True)
    page.block_thread()
