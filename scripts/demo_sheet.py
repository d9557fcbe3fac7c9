"""A contact sheet: the same frames of several videos below each other, with labels."""

from __future__ import annotations

from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

MARGIN, LABEL = 8, 20
PAPER, INK, FAINT = (24, 24, 27), (235, 235, 235), (150, 150, 155)


def pick_frames(path: Path, wanted: list[int]) -> dict[int, Image.Image]:
    """The frames of these indices, as pictures; those past the end are left out."""
    found, last = {}, max(wanted)
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                found[index] = frame.to_image()
            if index == last:
                break
    return found


def count_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def evenly(frames: int, columns: int) -> list[int]:
    """Up to ``columns`` frame numbers from the first to the last of ``frames``."""
    if frames <= columns:
        return list(range(frames))
    return [round(i * (frames - 1) / (columns - 1)) for i in range(columns)]


def contact_sheet(videos: dict[str, Path], target: Path, note: str = "", columns: int = 6, width: int = 224) -> Path:
    """Write the sheet as a PNG.

    Args:
        videos: label and file of each row; frame i of all is the same moment. As many frames as the last one has.
        width: of one picture, in pixels.
    """
    indices = evenly(count_frames(list(videos.values())[-1]), columns)
    rows = {label: pick_frames(path, indices) for label, path in videos.items()}
    first = next(iter(rows.values()))[indices[0]]
    height = max(1, round(width * first.height / first.width))
    sheet_width = MARGIN + len(indices) * (width + MARGIN)
    row_height = LABEL + height + MARGIN
    sheet = Image.new("RGB", (max(sheet_width, 460), len(rows) * row_height + LABEL + MARGIN), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, (label, pictures) in enumerate(rows.items()):
        top = row * row_height + LABEL
        for column, index in enumerate(indices):
            left = MARGIN + column * (width + MARGIN)
            draw.text((left, top - LABEL + 2), f"{label}, frame {index}", INK, font)
            if index in pictures:
                sheet.paste(pictures[index].resize((width, height), Image.Resampling.LANCZOS), (left, top))
    draw.text((MARGIN, sheet.height - LABEL), note, FAINT, font)
    part = target.with_name(target.name + ".part")
    sheet.save(part, "PNG")
    part.replace(target)
    return target
