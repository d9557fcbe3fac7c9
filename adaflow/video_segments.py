"""A long video written in segments that outlive the process, and joined without encoding again.

Each segment stands by itself (a closed group of pictures), and the frames of the one that is not whole yet are kept as
they came, so that a run that was broken off goes on after the last of them and ends in the bytes of an unbroken run.
"""

import errno
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from .runs import Run
from .storage import SafetensorsReader, save_tensor
from .video_output import hidden_beside
from .video_writer import CODECS, VideoWriter, exact_rate

FORMAT = "adaflow-save-2"
SEGMENT = 64
"""Frames, at least: how far apart the frames are that players can jump to, and what is encoded twice after a crash."""

LEVELS = {1: torch.uint8, 2: torch.uint16}  # by bytes


def coding_identity(fps, width, height, codec, quality, pixel_format, times, **_joined) -> dict:
    """What a segment depends on, of the settings of a :class:`SegmentedWriter`; the others come in at the end."""
    return {
        "format": FORMAT,
        "rate": str(exact_rate(fps)),
        "size": [width, height],
        "codec": [codec, quality, pixel_format],
        "in_order": times is not None,
        "encoder": [av.__version__, sorted(av.library_versions.items())],
    }


def disk_needs(count: int, width: int, height: int, codec: str, quality: int, chunk: int) -> tuple[int, int]:
    """Bytes of disk that a save of ``count`` frames takes at its peak, surely and generously.

    The kept frames of a segment stand beside it until it is whole; segments and joined file are there at one time.

    Args:
        chunk: frames of a call of :meth:`SegmentedWriter.write`.
    """
    raw, frame = width * height * 3, CODECS[codec].frame_bytes(width, height, quality)
    deepest = 2  # bytes of a value of ten bits
    kept = min(count, SEGMENT) * raw, min(count, SEGMENT - 1 + chunk) * raw * deepest
    return kept[0], round(kept[1] + 2 * count * frame)


def _where_to_join(run: Run, path: Path) -> Path:
    """Where the joined file grows: in the run's folder, which goes some day, if it can be renamed from there.

    Raises:
        OSError: files cannot be written beside ``path``.
    """
    trial, beside = run.path("trial"), hidden_beside(path, run.folder.name)
    trial.touch()
    try:
        trial.replace(beside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return beside
    finally:
        trial.unlink(missing_ok=True)
    beside.unlink()
    return run.path("joined.partial")


class SegmentedWriter:
    """Like :class:`VideoWriter`, on a :class:`Run` that keeps what is written; a context manager.

    On a clean exit the file takes its place and the run's folder is removed. After an exception all frames that were
    written stay: a writer made with the same run goes on after ``frames_written``, from which its frames must come.

    Args:
        run: whose identity covers the frames and :func:`coding_identity`.
        path, fps, width, height, codec, times, names: as for :class:`VideoWriter`.
        audio_source, audio_range, metadata: likewise.
        encoding: ``quality``, ``pixel_format`` and ``where``, likewise.

    Attributes:
        path: of the file; where ``names`` are given, the one it got, on exit.
    """

    def __init__(
        self,
        run: Run,
        path: Path,
        fps: Fraction | float,
        width: int,
        height: int,
        *,
        codec: str,
        times: Sequence[float] | None = None,
        names: Iterable[Path] | None = None,
        audio_source: str | Path | None = None,
        audio_range: tuple[float, float] | None = None,
        metadata: dict | None = None,
        **encoding,
    ):
        self._run, self.path, self._extension = run, path, CODECS[codec].extension
        self._place = {"names": names, "partial": _where_to_join(run, path)}
        self._encoding = {"fps": fps, "width": width, "height": height, "codec": codec, **encoding}
        self._around = {"audio_source": audio_source, "audio_range": audio_range, "metadata": metadata, "times": times}
        self._whole: list[list[int]] = run.progress.get("segments", [])
        self._open: list[int] = run.progress.get("open", [])
        self._segment: VideoWriter | None = None

    @property
    def frames_written(self) -> int:
        return sum(map(sum, self._whole)) + sum(self._open)

    @property
    def chunk(self) -> int | None:
        """Frames of the last call that wrote some; None where there was none."""
        return next((lengths[-1] for lengths in (self._open, *self._whole[-1:]) if lengths), None)

    def _file(self, number: int) -> str:
        return f"segment-{number:05}.{self._extension}"

    def _piece(self, number: int) -> str:
        """Of the segment that is not whole yet."""
        return f"frames-{len(self._whole):05}-{number:03}.safetensors"

    def write(self, frames) -> None:
        """Encode frames, as :meth:`VideoWriter.write` does; a segment ends with the frames of a call.

        They are on the disk before they are encoded: what is broken off later need not make them again.
        """
        self._go_on()
        if self._segment is None:
            self._begin_segment()
        levels = self._segment.levels(frames)
        if len(levels):
            self._keep(levels)
            self._encode(levels)

    def _keep(self, levels: np.ndarray) -> None:
        name, lengths = self._piece(len(self._open)), [*self._open, len(levels)]
        save_tensor(self._run.path(name), torch.from_numpy(levels), LEVELS[levels.dtype.itemsize])
        self._run.commit([name], [], segments=self._whole, open=lengths)
        self._open = lengths

    def _encode(self, levels: np.ndarray) -> None:
        self._segment.write_levels(levels)
        if self._segment.frames_written >= SEGMENT:
            self._end_segment()

    def _go_on(self) -> None:
        """Encode once more what was kept of a segment that an earlier process did not end."""
        if self._segment is None and self._open:
            self._begin_segment()
            for number in range(len(self._open)):
                kept = SafetensorsReader(self._run.checked(self._piece(number)))
                self._encode(kept.read("x", slice(None)).numpy())

    def _begin_segment(self) -> None:
        path, uneven = self._run.path(self._file(len(self._whole))), self._around["times"] is not None
        self._segment = VideoWriter(path, in_order=uneven, **self._encoding)

    def _end_segment(self) -> None:
        self._segment.finish()
        pieces = [self._piece(number) for number in range(len(self._open))]
        whole = [*self._whole, self._open]
        self._run.commit([self._file(len(self._whole))], pieces, segments=whole)
        self._whole, self._open, self._segment = whole, [], None

    def __enter__(self) -> "SegmentedWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._go_on()
                if self._segment is not None:
                    self._end_segment()
                self._join()
                self._whole = []
        finally:
            if self._segment is not None:
                self._segment.discard()
            if self._whole or self._open:
                self._run.close()
            else:
                self._run.remove()

    def _join(self) -> None:
        """Put all segments into the file."""
        with VideoWriter(self.path, **self._place, **self._around, **self._encoding) as whole:
            for number in range(len(self._whole)):
                whole.copy(self._run.checked(self._file(number)))
        self.path = whole.path
