"""Takes the workflows' thumbnails and the README's pictures from the real thing.

    COMFYUI_PATH=/path/to/ComfyUI python scripts/make_pictures.py graphs edits

``graphs`` needs Chromium and Playwright (both part of the test environment); ``edits`` runs the demo three times.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from comfy_client import ServerProcess
from front_end import fit_view, front_end, load_workflow
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
THUMBNAIL, PICTURE, SHEET = 400, 1600, 1000  # widths, pixels
EDITS = ("colour=blue", "season=winter", "style=watercolour")
IMAGES = ROOT / "docs" / "images"


def graph_picture(page, path: Path) -> Image.Image:
    """The graph of a saved workflow as the front end draws it."""
    load_workflow(page, path)
    edges = fit_view(page)
    picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
    return picture.crop([round(edge) for edge in edges])


def save_for_page(picture: Image.Image, width: int, target: Path) -> None:
    """A PNG of 128 colours at ``width``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    small = picture.convert("RGB").resize((width, round(picture.height * width / picture.width)), Image.LANCZOS)
    small.quantize(128).save(target, optimize=True)


def edits() -> None:
    """The contact sheets of the demo's edits."""
    for edit in EDITS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "scripts" / "run_demo.py"), "--edit", edit, "--output", folder]
            subprocess.run(command, check=True)
            sheet = Image.open(Path(folder) / "contact-sheet.png")
            save_for_page(sheet, SHEET, IMAGES / f"edit-{edit.split('=')[0]}.png")


def graphs() -> None:
    """Thumbnails of all workflows, and the picture of the basic one."""
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
                save_for_page(picture, PICTURE, IMAGES / "graph.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=["graphs", "edits"])
    if "COMFYUI_PATH" not in os.environ:
        sys.exit("COMFYUI_PATH names no ComfyUI")
    for name in parser.parse_args().what:
        {"graphs": graphs, "edits": edits}[name]()


if __name__ == "__main__":
    main()
