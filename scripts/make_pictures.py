"""Takes the workflows' thumbnails and the README's picture of the graph from the real front end.

    COMFYUI_PATH=/path/to/ComfyUI python scripts/make_pictures.py

Needs Chromium and Playwright (both part of the test environment).
"""

import os
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from comfy_client import ServerProcess
from front_end import fit_view, front_end, load_workflow
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
THUMBNAIL, PICTURE = 400, 1600  # widths, pixels


def graph_picture(page, path: Path) -> Image.Image:
    """The graph of a saved workflow as the front end draws it."""
    load_workflow(page, path)
    edges = fit_view(page)
    picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
    return picture.crop([round(edge) for edge in edges])


def main() -> None:
    if "COMFYUI_PATH" not in os.environ:
        sys.exit("COMFYUI_PATH names no ComfyUI")
    with (
        tempfile.TemporaryDirectory() as base,
        ServerProcess(Path(os.environ["COMFYUI_PATH"]), Path(base), cpu=True) as server,
        front_end(server.url, 2560, 1300) as page,
    ):
        for path in sorted((ROOT / "workflows").glob("*.json")):
            picture = graph_picture(page, path)
            small = picture.resize((THUMBNAIL, round(picture.height * THUMBNAIL / picture.width)), Image.LANCZOS)
            small.save(path.with_suffix(".jpg"), quality=80)
            if path.stem.endswith("basic-edit"):
                target = ROOT / "docs" / "images" / "graph.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                large = picture.resize((PICTURE, round(picture.height * PICTURE / picture.width)), Image.LANCZOS)
                large.quantize(128).save(target, optimize=True)


if __name__ == "__main__":
    main()
