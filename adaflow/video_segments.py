"""A long video written in segments that outlive the process, and joined without encoding again.

Each segment stands by itself (a closed group of pictures), so that a run that was broken off goes on after the last
whole one and ends in the bytes of an unbroken run.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av

from .runs import Run
from .video_writer import CODECS, VideoWriter, exact_rate

FORMAT = "adaflow-save-1"
SEGMENT = 64
"""Frames, at least: what is done twice after a crash, and how far apart the frames are that players can jump to."""


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


class SegmentedWriter:
    """Like :class:`VideoWriter`, on a :class:`Run` that keeps what is written; a context manager.

    On a clean exit the file takes its place and the run's folder is removed. After an exception the whole segments
    stay: a writer made with the same run goes on after ``frames_written``, from which its frames must come.

    Args:
        run: whose identity covers the frames and :func:`coding_identity`.
        path, fps, width, height, codec, times: as for :class:`VideoWriter`.
        audio_source, audio_range, metadata: likewise.
        encoding: ``quality``, ``pixel_format`` and ``where``, likewise.
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
        audio_source: str | Path | None = None,
        audio_range: tuple[float, float] | None = None,
        metadata: dict | None = None,
        **encoding,
    ):
        self._run, self._path, self._extension = run, path, CODECS[codec].extension
        self._encoding = {"fps": fps, "width": width, "height": height, "codec": codec, **encoding}
        self._around = {"audio_source": audio_source, "audio_range": audio_range, "metadata": metadata, "times": times}
        self._lengths: list[int] = run.progress.get("segments", [])
        self._segment: VideoWriter | None = None

    @property
    def frames_written(self) -> int:
        return sum(self._lengths) + (self._segment.frames_written if self._segment else 0)

    def _file(self, number: int) -> str:
        return f"segment-{number:05}.{self._extension}"

    def write(self, frames) -> None:
        """Encode frames, as :meth:`VideoWriter.write` does; a segment ends with the frames of a call."""
        if self._segment is None:
            path, uneven = self._run.path(self._file(len(self._lengths))), self._around["times"] is not None
            self._segment = VideoWriter(path, in_order=uneven, **self._encoding)
        self._segment.write(frames)
        if self._segment.frames_written >= SEGMENT:
            self._end_segment()

    def _end_segment(self) -> None:
        self._segment.finish()
        file, lengths = self._file(len(self._lengths)), [*self._lengths, self._segment.frames_written]
        self._run.commit([file], [], segments=lengths)
        self._lengths, self._segment = lengths, None

    def __enter__(self) -> "SegmentedWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                if self._segment is not None:
                    self._end_segment()
                self._join()
                self._lengths = []
        finally:
            if self._segment is not None:
                self._segment.discard()
            if self._lengths:
                self._run.close()
            else:
                self._run.remove()

    def _join(self) -> None:
        """Put all segments into the file."""
        with VideoWriter(self._path, mark=self._run.key, **self._around, **self._encoding) as whole:
            for number in range(len(self._lengths)):
                whole.copy(self._run.checked(self._file(number)))
