"""Figures that tests measure on a GPU, for a table at the end of the session."""

import paddle

from replknet_paddle.runtime.processes import visible_devices

_rows: list[tuple[str, str]] = []


def report(what: str, figure: str) -> None:
    """Add a row to the table."""
    _rows.append((what, figure))


def table() -> list[str]:
    """The lines of the table, in Markdown; none where nothing was measured."""
    if not _rows:
        return []
    names = {paddle.device.cuda.get_device_name(i) for i in range(visible_devices())}
    title = f"{visible_devices()} x {', '.join(sorted(names))}, Paddle {paddle.__version__}"
    title += f", CUDA {paddle.version.cuda()}, cuDNN {paddle.version.cudnn()}"
    return [
        "",
        f"| {title} | |",
        "|---|---|",
        *(f"| {what} | {figure} |" for what, figure in _rows),
    ]
