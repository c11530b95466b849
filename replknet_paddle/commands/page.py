"""`replknet page`."""

import logging
import signal
import sys

from replknet_paddle.commands.flags import add_config_flags
from replknet_paddle.commands.predict import config_given
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import find_path


def add_page_flags(parser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--port", type=int, default=7860, metavar="N", help="of 127.0.0.1 (%(default)s)"
    )
    add_config_flags(parser)


def run_page(args) -> int:
    """
    Serve a web page on this machine: drop a picture, see its classes and where the network looks.

    MODEL is a run folder or a checkpoint in one (output/RUN/best), the name of a published model,
    or an exported folder, which gives no heat map.

    example: replknet page output/RUN/best
    """
    if not 1 <= args.port <= 65535:
        raise InputError(f"--port is {args.port}; allowed: an integer from 1 to 65535")

    from replknet_paddle.deploy.export import is_export
    from replknet_paddle.deploy.page import build_page, import_gradio, reserve_port, serve
    from replknet_paddle.deploy.predict import Predictor

    args.model = find_path(args.model)
    listener = reserve_port(args.port)  # before the model, which takes longer

    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio calling itself
    import_gradio()
    backend = "auto" if is_export(args.model) else "eager"  # which has the network, for heat maps
    predictor = Predictor(args.model, backend=backend, config=config_given(args))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which removes the uploads
    serve(build_page(args.model, predictor), listener)
    return 0
