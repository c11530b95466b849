"""Compile the operators and image operations, which otherwise happens on first use.

They go into the user's cache: ~/.cache/replknet_paddle, or the folder that REPLKNET_PADDLE_CACHE
names. Nothing happens where they are up to date.
"""

import sys


def add_arguments(parser) -> None:
    pass


def run(args) -> int:
    from replknet_paddle.data.transforms.pixels import pixels_library
    from replknet_paddle.ops.library import operators_library
    from replknet_paddle.runtime.compiler import BuildError

    status = 0
    for what, library in (
        ("convolution operators", operators_library),
        ("image operations", pixels_library),
    ):
        try:
            path, seconds = library().build()
        except BuildError as error:
            try:
                kept = library().find()
            except BuildError:
                kept = None
            if kept is None:
                status = 1
                print(f"no compiled {what}, so Paddle's or Pillow's are used: {error}")
            else:
                print(f"the {what} built before stay in use: {error}")
        else:
            if seconds:
                print(f"{what} built in {seconds:.0f} s: {path}", file=sys.stderr)
    return status
