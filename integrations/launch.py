"""Run a script of PaddleSeg or PaddleDetection that knows RepLKNet.

    python integrations/launch.py PaddleSeg/tools/train.py \\
        --config integrations/paddleseg/upernet_replknet_31b_ade20k.yml
    python integrations/launch.py PaddleDetection/tools/train.py \\
        -c integrations/paddledetection/fcos_replknet_31b_2x_coco.yml

The script belongs to a clone of the project's develop branch; its arguments follow it. Neither
project imports plugins, so the adapter is imported before the script starts. Under
`paddle.distributed.launch`, name this file as the script.
"""

import runpy
import sys
from importlib import import_module
from pathlib import Path

ADAPTERS = {
    "paddleseg": "integrations.paddleseg.replknet",
    "ppdet": "integrations.paddledetection.replknet",
}


def find_clone(script: Path) -> tuple[Path, str] | None:
    """The clone that `script` is in, and its adapter's module; None where there is none."""
    for folder in script.resolve().parents:
        for package, adapter in ADAPTERS.items():
            if (folder / package / "__init__.py").is_file():
                return folder, adapter
    return None


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    script = Path(argv[0])
    clone = find_clone(script) if script.is_file() else None
    if clone is None:
        print(
            f"error: {script} is not a script in a clone of PaddleSeg or PaddleDetection",
            file=sys.stderr,
        )
        return 2
    folder, adapter = clone
    # As if the script had been started; this repository goes last, so that it hides nothing.
    sys.path[0] = str(script.resolve().parent)
    sys.path.insert(1, str(folder))
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import_module(adapter)
    sys.argv = argv
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
