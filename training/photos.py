"""Gathers the free photographs that the demo model learns from: out of Debian packages, into one folder of JPEG files.

    python training/photos.py --packages FOLDER --out FOLDER

Runs on Debian 12 (apt-get, dpkg-deb). ``--packages`` keeps what was downloaded, nothing is installed. Writes the
pictures, ``photos.json`` (package, version and file of each, its checksum) and prints the table of the credits.
Each package's licences were read in its ``copyright`` file; packages whose pictures are not free are not listed here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

LARGEST, OBJECT, QUALITY = 1280, 288, 86
TUXPAINT_KINDS = ("animals", "food", "plants", "vehicles", "household", "clothes", "sports", "naturalforces")
SMALLEST = 480  # pixels of a wallpaper's shorter side; less is a thumbnail


@dataclass(frozen=True)
class Package:
    """Where pictures are in a package, and its licence in short."""

    name: str
    licence: str
    patterns: tuple[str, ...]
    skip: tuple[str, ...] = ()


WALLPAPERS = (
    Package("mate-backgrounds", "GPL-2+, CC-BY-SA-4.0", ("**/nature/*.jpg", "**/Elephants.jpg")),
    Package("lomiri-wallpapers-16.04", "CC-BY-4.0, CC-BY-SA-3.0/4.0, CC0", ("**/*.jpg",)),
    Package("lomiri-wallpapers-20.04", "CC-BY-4.0, CC-BY-SA-3.0/4.0, CC0", ("**/*.jpg", "**/*.png")),
    Package("plasma-workspace-wallpapers", "GPL-2+", ("**/images/*.jpg", "**/images/*.png")),
    Package("ukui-wallpapers", "CC-BY-SA-3.0", ("**/*.jpg", "**/*.png")),
    Package("gnome-backgrounds", "CC-BY-SA-3.0", ("**/wood-*.webp", "**/licorice-*.webp", "**/vnc-*.webp")),
    Package("palapeli-data", "GPL-2+, CC0", ("**/collection/*.jpg",)),
)
OBJECTS = (
    Package(
        "tuxpaint-stamps-default",
        "GPL-2+, public domain",
        tuple(f"**/{kind}/**/*.png" for kind in TUXPAINT_KINDS),
        ("cartoon", "outline", "symbols"),
    ),
)


def unpack(package: str, folder: Path) -> tuple[Path, str]:
    """The package's files and its version; downloaded when they are not there yet."""
    target = folder / package
    if not target.is_dir():
        if not list(folder.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True)
        [file] = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", file.name, target.name], cwd=folder, check=True)
    [file] = folder.glob(f"{package}_*.deb")
    return target, file.name.split("_")[1].replace("%3a", ":")


def likeness(image: Image.Image) -> np.ndarray:
    """240 bits, nearly the same for the same picture at another size."""
    small = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), np.int16)
    return (small[:, 1:] > small[:, :-1]).ravel()


def on_background(stamp: Image.Image, backgrounds: list[Image.Image], number: int) -> Image.Image:
    """An object with transparent surroundings, put before the blur of another picture."""
    stamp.thumbnail((OBJECT, OBJECT))
    behind = backgrounds[number % len(backgrounds)].resize(stamp.size).filter(ImageFilter.GaussianBlur(12))
    behind.paste(stamp, mask=stamp.getchannel("A"))
    return behind


class Folder:
    """The pictures that were kept, each once."""

    def __init__(self, path: Path):
        self.path, self.entries, self.seen = path, [], []
        path.mkdir(parents=True, exist_ok=True)

    def add(self, image: Image.Image, package: Package, version: str, source: str) -> bool:
        """Keep ``image`` unless it, or one very like it, is there."""
        bits = likeness(image)
        if any(np.count_nonzero(bits != other) < 18 for other in self.seen):
            return False
        self.seen.append(bits)
        data = BytesIO()
        image.save(data, "JPEG", quality=QUALITY, optimize=True)
        name = f"{len(self.entries):04}.jpg"
        (self.path / name).write_bytes(data.getvalue())
        entry = {"file": name, "package": package.name, "version": version, "source": source}
        entry |= {"licence": package.licence, "sha256": hashlib.sha256(data.getvalue()).hexdigest()}
        self.entries.append(entry)
        return True


def files_of(package: Package, folder: Path) -> tuple[list[Path], str, Path]:
    root, version = unpack(package.name, folder)
    found = sorted({file for pattern in package.patterns for file in root.glob(pattern) if not file.is_symlink()})
    found = [file for file in found if not any(word in str(file.relative_to(root)) for word in package.skip)]
    return found, version, root


def gather(packages: Path, out: Path) -> Folder:
    """Wallpapers first, the largest size of each; then objects, before their blurred colours."""
    folder, backgrounds = Folder(out), []
    for package in WALLPAPERS:
        files, version, root = files_of(package, packages)
        opened = sorted((Image.open(file) for file in files), key=lambda image: -image.size[0])
        for image in opened:
            if min(image.size) < SMALLEST:
                continue
            source = str(Path(image.filename).relative_to(root))
            image = image.convert("RGB")
            image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
            if folder.add(image, package, version, source):
                backgrounds.append(image)
    for package in OBJECTS:
        files, version, root = files_of(package, packages)
        for number, file in enumerate(files):
            image = Image.open(file)
            if min(image.size) < 96:
                continue
            whole = on_background(image.convert("RGBA"), backgrounds, number)
            folder.add(whole, package, version, str(file.relative_to(root)))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="where downloaded packages are kept")
    parser.add_argument("--out", type=Path, required=True, help="where the pictures go")
    options = parser.parse_args()
    options.packages.mkdir(parents=True, exist_ok=True)
    folder = gather(options.packages, options.out)
    (options.out / "photos.json").write_text(json.dumps(folder.entries, indent=1) + "\n")
    counts = Counter((entry["package"], entry["version"], entry["licence"]) for entry in folder.entries)
    print("| package | version | pictures | licences |\n| --- | --- | --- | --- |")
    for (package, version, licence), count in counts.items():
        print(f"| {package} | {version} | {count} | {licence} |")


if __name__ == "__main__":
    main()
