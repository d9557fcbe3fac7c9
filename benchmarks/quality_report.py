"""What benchmarks/edit_quality.py writes: pieces, contact sheets, and of the pieces a result, tables and a plot."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import fmean, stdev

from PIL import Image, ImageDraw, ImageFont

TRUTH, CEILING, NO_EDIT = "truth", "truth through the autoencoder", "source through the autoencoder"
EACH, TOKENFLOW, OWN, SHORT = "frame by frame", "TokenFlow settings", "AdaFlow", "AdaFlow, short clips, budget {}"
NOT_INJECTED, INTERPOLATED = "nothing injected: ", ", interpolated"
FULL = SHORT.format("unlimited")
MARKERS = "<!-- {} of tables written by benchmarks/edit_quality.py -->"
COLUMNS, LABEL, MARGIN = 6, 18, 6
STEADIER, LOST = 2.0, 0.5  # asked: times less warping error than frame by frame; dB that budget 8 may lose


def write_json(path: Path, content) -> None:
    """NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_plain(content), indent=1) + "\n")
    partial.replace(path)


def _plain(content):
    if isinstance(content, dict):
        return {name: _plain(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_plain(value) for value in content]
    if isinstance(content, float):
        return float(f"{content:.6g}") if math.isfinite(content) else None
    return content


def write_sheet(path: Path, rows: dict[str, object], title: str) -> None:
    """Some frames of each row's images (frames, 3, height, width), from 0 to 1, under its name."""
    images = next(iter(rows.values()))
    count, _, height, width = images.shape
    columns = min(COLUMNS, count)
    chosen = [round(i * (count - 1) / max(1, columns - 1)) for i in range(columns)]
    tall = height + LABEL + MARGIN
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, LABEL + MARGIN + len(rows) * tall), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    draw.text((MARGIN, MARGIN // 2), title, "black", font)
    for row, (name, frames) in enumerate(rows.items()):
        top = LABEL + MARGIN + row * tall
        draw.text((MARGIN, top), f"{name}, frames {', '.join(map(str, chosen))}", "black", font)
        pixels = (frames[chosen].clamp(0, 1) * 255).round().byte().movedim(1, -1).cpu().numpy()
        for column, picture in enumerate(pixels):
            sheet.paste(Image.fromarray(picture), (MARGIN + column * (width + MARGIN), top + LABEL))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def differing(one: dict, other: dict) -> list[str]:
    """Names of what two results say differently of where they come from."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _refuse_unlike(folder: Path, paths: list[Path], about: list[dict]) -> None:
    """Say which pieces were made otherwise than the rest, and in what."""
    names = [name for name in about[0] if any(other.get(name) != about[0][name] for other in about)]
    if not names:
        return
    lines = []
    for name in names:
        made: dict[str, list[str]] = {}
        for path, one in zip(paths, about, strict=True):
            made.setdefault(json.dumps(one.get(name)), []).append(path.stem)
        lines += [f"  {name} {value}: {', '.join(stems)}" for value, stems in made.items()]
    raise SystemExit(f"the pieces in {folder} were made with different {', '.join(names)}:\n" + "\n".join(lines))


def _keep_common(pieces: list[dict]) -> None:
    """Leave out settings that some pieces have not been given yet, and say so."""
    common = [name for name in pieces[0]["measures"] if all(name in piece["measures"] for piece in pieces)]
    partly = dict.fromkeys(name for piece in pieces for name in piece["measures"] if name not in common)
    for name in partly:
        held = sum(name in piece["measures"] for piece in pieces)
        print(f"left out, since {held} of {len(pieces)} pieces have it: {name}")
    for piece in pieces:
        piece["measures"] = {name: piece["measures"][name] for name in common}


def read_pieces(folder: Path) -> tuple[dict, list[dict]]:
    """What all pieces have in common, and the pieces with the settings that all of them have.

    Raises:
        SystemExit: there are none, some are missing, or they were not made alike.
    """
    paths = sorted(folder.glob("*.json"))
    pieces = [json.loads(path.read_text()) for path in paths]
    if not pieces:
        raise SystemExit(f"{folder} holds no pieces: run the parts first")
    about = [piece.pop("about") for piece in pieces]
    _refuse_unlike(folder, paths, about)
    expected = about[0]["options"]["clips"] * len(about[0]["options"]["edits"])
    if len(pieces) != expected:
        raise SystemExit(f"{folder} holds {len(pieces)} of {expected} pieces: run the other parts")
    _keep_common(pieces)
    order = about[0]["options"]["edits"]
    return about[0], sorted(pieces, key=lambda piece: (piece["clip"], order.index(piece["edit"])))


def values_of(pieces: list[dict], setting: str, measure: str) -> list[float]:
    """One a piece; those that have none are left out."""
    values = (piece["measures"][setting].get(measure) for piece in pieces)
    return [value for value in values if value is not None]


def _pairs(pieces: list[dict], setting: str, other: str, measure: str) -> list[tuple[float, float]]:
    """A measure of both settings, of each piece that has it of both."""
    found = [[piece["measures"][name].get(measure) for name in (setting, other)] for piece in pieces]
    return [(a, b) for a, b in found if a is not None and b is not None]


def ratio(pieces: list[dict], setting: str, measure: str, to: str) -> float:
    """Of the sums over the tasks: those whose truth is unsteady, as a pencil sketch is, are most of it."""
    pairs = _pairs(pieces, setting, to, measure)
    below = sum(b for _, b in pairs)
    return sum(a for a, _ in pairs) / below if below else math.nan


def typical_ratio(pieces: list[dict], setting: str, measure: str, to: str) -> float:
    """Geometric mean of the tasks' ratios: each counts alike, however unsteady. Zeros are left out."""
    logs = [math.log(a / b) for a, b in _pairs(pieces, setting, to, measure) if a > 0 and b > 0]
    return math.exp(fmean(logs)) if logs else math.nan


def excess(pieces: list[dict], setting: str, measure: str) -> float:
    """Mean over the tasks of what is more than that of the truth through the autoencoder."""
    gaps = [a - b for a, b in _pairs(pieces, setting, CEILING, measure)]
    return fmean(gaps) if gaps else math.nan


def difference(pieces: list[dict], setting: str, other: str, measure: str) -> tuple[float, float]:
    """Mean over the clips of ``setting`` less ``other``, and its standard error."""
    gaps = [a - b for a, b in _pairs(pieces, setting, other, measure)]
    return fmean(gaps), stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else math.nan


def summary(pieces: list[dict]) -> dict:
    """Mean and standard deviation over the clips of every measure, by setting."""
    found: dict[str, dict] = {}
    for setting, measures in pieces[0]["measures"].items():
        found[setting] = {}
        for measure in measures:
            values = values_of(pieces, setting, measure)
            if values:
                spread = stdev(values) if len(values) > 1 else math.nan
                found[setting][measure] = {"mean": fmean(values), "deviation": spread, "clips": len(values)}
        for measure in ("warping", "warping object"):
            for to in (TRUTH, CEILING):
                found[setting][f"{measure} to that of the {to}"] = ratio(pieces, setting, measure, to)
                typical = typical_ratio(pieces, setting, measure, to)
                found[setting][f"{measure} to that of the {to}, geometric mean of the tasks"] = typical
            found[setting][f"{measure} over that of the {CEILING}"] = excess(pieces, setting, measure)
    return found


def table(pieces: list[dict]) -> str:
    """Markdown, a row a setting."""
    columns = {
        "PSNR": ("psnr", "{:.2f}"), "in the object": ("psnr object", "{:.2f}"), "outside": ("psnr rest", "{:.2f}"),
        "SSIM": ("ssim", "{:.3f}"), "object": ("ssim object", "{:.3f}"), "rest": ("ssim rest", "{:.3f}"),
        "untouched, PSNR": ("psnr untouched", "{:.2f}"),
        "asked": ("asked", "{:.1%}"), "caption": ("agreement", "{:.1%}"),
    }  # fmt: skip
    columns = {name: what for name, what in columns.items() if values_of(pieces, CEILING, what[0])}
    heads = ["Setting", *columns, "warping error x 1000", "over the autoencoder's"]
    heads += [place + to for place in ("", "object, ") for to in ("to the truth's", "to the autoencoder's")]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for setting in pieces[0]["measures"]:
        cells = [setting]
        for measure, form in columns.values():
            values = values_of(pieces, setting, measure)
            cells.append(form.format(fmean(values)) if values else "")
        cells.append(f"{1000 * fmean(values_of(pieces, setting, 'warping')):.3f}")
        cells.append(f"{1000 * excess(pieces, setting, 'warping'):+.3f}")
        ratios = [(measure, to) for measure in ("warping", "warping object") for to in (TRUTH, CEILING)]
        cells += [f"{typical_ratio(pieces, setting, measure, to):.2f}" for measure, to in ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparisons(pieces: list[dict]) -> str:
    """Markdown: settings against one another, clip by clip."""
    pairs = []
    for prefix in ("", NOT_INJECTED):
        own, tokenflow, each = prefix + OWN, prefix + TOKENFLOW, prefix + EACH
        pairs += [(own, each), (tokenflow, each), (own, tokenflow), (own + INTERPOLATED, own)]
    budgets = [name for name in pieces[0]["measures"] if re.fullmatch(SHORT.format(r"\d+"), name)]
    pairs += [(name, FULL) for name in budgets] + [(name + INTERPOLATED, name) for name in (FULL, *budgets)]
    lines = ["| Setting | against | PSNR, dB | warping error | object's |", "| --- | --- | ---: | ---: | ---: |"]
    for setting, other in pairs:
        if setting not in pieces[0]["measures"] or other not in pieces[0]["measures"]:
            continue
        gap, error = difference(pieces, setting, other, "psnr")
        ratios = [
            f"x {typical_ratio(pieces, setting, measure, other):.2f}" for measure in ("warping", "warping object")
        ]
        lines.append(f"| {setting} | {other} | {gap:+.2f} ± {error:.2f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def verdicts(pieces: list[dict]) -> list[dict]:
    """What is asked of the method, by kind of edit and over all tasks.

    Against frame by frame editing half the warping error at no less PSNR, and of budget 8 less than 0.5 dB lost.
    """
    owns, lasts = (OWN, *(SHORT.format(budget) for budget in (20, 8))), ("", INTERPOLATED)
    pairs = [(OWN + last, EACH) for last in lasts]
    pairs += [(NOT_INJECTED + own + last, NOT_INJECTED + EACH) for own in owns for last in lasts]
    pairs += [(SHORT.format(8) + last, FULL + last) for last in lasts]
    pairs = [pair for pair in pairs if set(pair) <= set(pieces[0]["measures"])]
    found = []
    for edit, chosen in {**by_edit(pieces), "all": pieces}.items():
        for setting, other in pairs:
            gap = difference(chosen, setting, other, "psnr")[0]
            one = {"edit": edit, "setting": setting, "against": other, "psnr": gap, "met": gap > -LOST}
            if other.endswith(EACH):
                one["times less warping error"] = times = typical_ratio(chosen, other, "warping", setting)
                one["warping over the autoencoder's"] = [excess(chosen, s, "warping") for s in (setting, other)]
                one["met"] = times >= STEADIER and gap >= 0
            found.append(one)
    return found


def verdict_table(pieces: list[dict]) -> str:
    """Markdown of :func:`verdicts`."""
    heads = ["PSNR, dB", "times less warping error", "x 1000 over the autoencoder's: its / other's"]
    lines = [f"| Edit | Setting | against | {' | '.join(heads)} | |", "| --- | --- | --- | ---: | ---: | ---: | --- |"]
    for one in verdicts(pieces):
        times = over = ""
        if "times less warping error" in one:
            times = f"{one['times less warping error']:.2f}"
            over = " / ".join(f"{1000 * value:+.3f}" for value in one["warping over the autoencoder's"])
        word = "met" if one["met"] else "missed"
        cells = (one["edit"], one["setting"], one["against"], f"{one['psnr']:+.2f}", times, over, word)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_edit(pieces: list[dict]) -> dict[str, list[dict]]:
    """The pieces of each kind of edit."""
    return {edit: [p for p in pieces if p["edit"] == edit] for edit in dict.fromkeys(p["edit"] for p in pieces)}


def plot(pieces: list[dict], path: Path) -> None:
    """PSNR against warping error, a panel for each kind of edit; bars are standard errors over the clips."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    edits = by_edit(pieces)
    figure, panels = pyplot.subplots(1, len(edits), figsize=(4.6 * len(edits), 5.8), squeeze=False)
    settings = [name for name in pieces[0]["measures"] if name not in (TRUTH, NO_EDIT)]
    plain = {name: name.removeprefix(NOT_INJECTED).removesuffix(INTERPOLATED) for name in settings}
    colours = dict(zip(dict.fromkeys(plain.values()), pyplot.get_cmap("tab10").colors, strict=False))
    for panel, (edit, chosen) in zip(panels[0], edits.items(), strict=True):
        for setting in settings:
            values = values_of(chosen, setting, "psnr")
            error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
            at, colour = typical_ratio(chosen, setting, "warping", TRUTH), colours[plain[setting]]
            marker = "*" if setting == CEILING else "s" if INTERPOLATED in setting else "o"
            filled = "none" if setting.startswith(NOT_INJECTED) else "full"
            panel.errorbar(
                at, fmean(values), error,
                fmt=marker, color=colour, fillstyle=filled, label=setting, markersize=8, capsize=2,
            )  # fmt: skip
        panel.set_title(f"{edit} ({len(chosen)})")
        panel.set_xlabel("warping error, truth's = 1")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("PSNR to the truth, dB")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=9)
    figure.tight_layout(rect=(0, 0.26, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _parts(pieces: list[dict], cut: str) -> str:
    """How many clips, and so keyframes, a way of cutting made."""
    counts = [piece["keyframes"][cut] for piece in pieces]
    return f"{min(counts)} to {max(counts)} (mean {fmean(counts):.1f})"


def fill(page: Path, markers: str, text: str) -> None:
    """Put ``text`` between the two markers of a page, in the place of what stood there."""
    begin, end = markers.format("Begin"), markers.format("End")
    before, rest = page.read_text().split(begin)
    after = rest.split(end)[1]
    partial = page.with_suffix(".partial")
    partial.write_text(before + begin + "\n\n" + text + "\n\n" + end + after)
    partial.replace(page)


def write_tables(page: Path, about: dict, pieces: list[dict]) -> None:
    """Put the tables between their markers in a page."""
    options, edits = about["options"], by_edit(pieces)
    made = (
        f"GPU: {about['gpu']}; torch {about['torch']}; commit {about['commit'][:7]}. {options['clips']} clips of "
        f"{options['frames']} frames, {options['width']}x{options['height']} pixels; {options['inversion_steps']} "
        f"steps of inversion, {options['steps']} of sampling, guidance {' / '.join(map(str, options['cfg']))} "
        f"for foreground / background / style. AdaFlow cut a clip into {_parts(pieces, 'adaptive')} parts, where clips "
        f"are short into {_parts(pieces, 'short')}: so many keyframes a step."
    )
    picture = "![PSNR against warping error of every setting](images/quality.png)"
    text = [
        made,
        picture,
        "### What is asked of the method",
        verdict_table(pieces),
        "### All edits",
        table(pieces),
        comparisons(pieces),
    ]
    for edit, chosen in edits.items():
        text += [f"### {edit.capitalize()}", table(chosen), comparisons(chosen)]
    fill(page, MARKERS, "\n\n".join(text))


def collect(folder: Path, root: Path) -> None:
    """Result, tables and plot of all pieces in ``folder``."""
    about, pieces = read_pieces(folder)
    result = {**about, "verdicts": verdicts(pieces), "all edits": summary(pieces)}
    result |= {edit: summary(chosen) for edit, chosen in by_edit(pieces).items()}
    write_json(root / "benchmarks" / "results" / "edit-quality.json", {**result, "clips": pieces})
    write_tables(root / "docs" / "quality.md", about, pieces)
    plot(pieces, root / "docs" / "images" / "quality.png")
    print(table(pieces), comparisons(pieces), sep="\n\n")
