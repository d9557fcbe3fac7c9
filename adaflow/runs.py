"""Runs on disk that go on where they were broken off: a folder of safetensors files and a manifest.

A file counts once the manifest names it with its checksum. Files and manifest are synced to the disk and renamed, so
whatever ends the process, the manifest on disk names whole files only.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .storage import checksum, sync_folder, write_text_durably

logger = logging.getLogger(__name__)
FORMAT = "adaflow-run-1"
MANIFEST, LOCK = "manifest.json", "lock"
MAX_BYTES = 100 * 10**9
MAX_AGE = 7 * 24 * 3600.0
_FOLDER = re.compile(r"[a-z]+-[0-9a-f]{16}(-\d+)?")
_open_here: "weakref.WeakValueDictionary[Path, Run]" = weakref.WeakValueDictionary()


class DamagedRunError(RuntimeError):
    """A file of a run that is in use is gone, or is not what was written."""


def digest(identity: dict) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class Run:
    """One run's folder, locked until this object is closed or dropped; made by :func:`open_run`.

    Attributes:
        folder: of its files.
        identity: everything its result depends on, as plain data.
        progress: what the last :meth:`commit` noted; empty for a run that begins.
        note: why an earlier state is not taken up, or "".
    """

    def __init__(self, folder: Path, identity: dict, lock: FileLock):
        self.folder, self.identity, self._lock = folder, identity, lock
        self._files: dict[str, str] = {}
        self._marks: dict[str, tuple] = {}
        self._commits = 0
        self.progress: dict = {}
        self.note = ""

    @property
    def finished(self) -> bool:
        """Whether a commit said that all is done, so that nothing is written any more."""
        return self.progress.get("finished", False)

    @property
    def closed(self) -> bool:
        """Whether others may use or remove the folder."""
        return not self._lock.is_locked

    @property
    def key(self) -> str:
        """Names the result: equal for equal identities."""
        return digest(self.identity)

    def path(self, name: str) -> Path:
        return self.folder / name

    def commit(self, added: dict[str, str | None] | list[str], dropped: list[str], **progress) -> None:
        """Note that the files ``added`` are whole, ``dropped`` are needed no more, and how far the run is.

        Args:
            added: names, or names and checksums; None where one is not known.
        """
        checksums = added if isinstance(added, dict) else dict.fromkeys(added)
        files = {name: value for name, value in self._files.items() if name not in dropped}
        files |= {name: known or checksum(self.path(name)) for name, known in checksums.items()}
        state = {"files": files, "progress": progress, "commits": self._commits + 1}
        manifest = {"format": FORMAT, "identity": self.identity, **state}
        write_text_durably(self.path(MANIFEST), json.dumps({**manifest, "checksum": digest(manifest)}, indent=1))
        self._files, self.progress, self._commits = files, progress, self._commits + 1
        self._marks |= {name: self._mark(name) for name in added}
        for name in dropped:
            self.path(name).unlink(missing_ok=True)

    def checked(self, name: str, between: Callable[[], None] = lambda: None) -> Path:
        """Path of a file that counts, to read it. Where it was touched since the last time, its checksum is taken anew.

        Args:
            between: called now and then meanwhile; may raise.

        Raises:
            DamagedRunError: it is gone, or its checksum is another.
        """
        try:
            mark = self._mark(name)
            whole = mark == self._marks.get(name) or checksum(self.path(name), between) == self._files.get(name)
        except FileNotFoundError:
            whole = False
        if not whole:
            raise DamagedRunError(
                f"AdaFlow: {name} in {self.folder} is missing or damaged: something other than AdaFlow changed it. Set "
                "resume to 'start afresh' in AdaFlow DDIM Invert (AdaFlow Save Video for a segment) and queue again"
            )
        self._marks[name] = mark
        return self.path(name)

    def _mark(self, name: str) -> tuple:
        """What changes when somebody touches a file."""
        status = self.path(name).stat()
        return status.st_ino, status.st_size, status.st_mtime_ns

    def names(self) -> list[str]:
        """Of the files that count."""
        return list(self._files)

    def size(self) -> int:
        """Bytes on disk so far."""
        return _size(self.folder)

    def close(self) -> None:
        """Let others use or remove the folder."""
        self._lock.release()

    def remove(self) -> None:
        """Remove the folder with all that is in it: nobody needs the run any more."""
        with FileLock(self.folder.parent / LOCK):
            self.close()
            _remove(self.folder)

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Close it when the block raises; what is committed stays."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def take_up(self, between: Callable[[], None] = lambda: None) -> None:
        """Read the manifest and check every file it names.

        Args:
            between: called now and then meanwhile; may raise.

        Raises:
            ValueError: the state cannot be used; says why.
        """
        manifest = self._manifest()
        if manifest is None:
            return
        for name, expected in manifest["files"].items():
            if not self.path(name).is_file() or checksum(self.path(name), between) != expected:
                raise ValueError(f"{name} is missing or damaged")
        self._files, self.progress = manifest["files"], manifest["progress"]
        self._commits = manifest.get("commits", 0)  # runs of earlier versions did not count
        self._marks = {name: self._mark(name) for name in self._files}
        self._remove_strays()
        os.utime(self.path(MANIFEST))  # used just now, so not old

    def _manifest(self) -> dict | None:
        """What the last commit noted; None where there was none yet. Raises ValueError as :meth:`take_up`."""
        path = self.path(MANIFEST)
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            expected, form = manifest.pop("checksum", None), manifest.get("format")
        except (AttributeError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError("its manifest is damaged") from error
        if form != FORMAT:
            raise ValueError(f"its format is {form}, not {FORMAT}")
        if digest(manifest) != expected:
            raise ValueError("its manifest is damaged")
        if manifest["identity"] != self.identity:
            raise ValueError("it was made from other inputs")
        return manifest

    def reached(self) -> tuple:
        """Of two runs of one identity that were not taken up yet, the one for which this is more is to be preferred.

        A damaged manifest comes before none: it is worth a word, and the folder is cleared.
        """
        try:
            manifest = self._manifest()
        except ValueError:
            return (1,)
        if manifest is None:
            return (0,)
        finished, used = manifest["progress"].get("finished", False), self.path(MANIFEST).stat().st_mtime
        return 2, finished, manifest.get("commits", 0), used

    def is_sound(self, between: Callable[[], None] = lambda: None) -> bool:
        """Whether all that was committed still stands on the disk as it was; only what was touched since is read.

        Args:
            between: called now and then meanwhile; may raise.
        """
        try:
            manifest = self._manifest()
            if manifest is None or manifest["files"] != self._files:
                return False
            for name in self._files:
                self.checked(name, between)
        except (ValueError, DamagedRunError):
            return False
        os.utime(self.path(MANIFEST))  # used just now, so not old
        return True

    def clear(self) -> None:
        """Remove all that the run has done."""
        self._files, self._marks, self.progress, self._commits = {}, {}, {}, 0
        self.path(MANIFEST).unlink(missing_ok=True)
        self._remove_strays()

    def _remove_strays(self) -> None:
        for path in self.folder.iterdir():
            if path.name not in (MANIFEST, LOCK, *self._files):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)


def open_run(
    root: Path, kind: str, identity: dict, afresh: bool = False, between: Callable[[], None] = lambda: None
) -> Run:
    """Open the run of ``identity`` below ``root``, begun or new, and lock it against every other process.

    A finished run that this process has open is given again. Else, of the folders of this identity that nobody uses,
    the one whose run got furthest is taken up, or if it is damaged cleared and the next one taken; where all are in use
    the run gets one of its own and begins anew.

    Args:
        kind: letters, the first part of the folder's name.
        identity: what the result depends on, as JSON holds it.
        afresh: forget what was done, in every folder that nobody uses.
        between: called now and then while files are checked, which may take minutes; may raise.
    """
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        sync_folder(root.parent)
    identity = json.loads(json.dumps(identity))
    name = f"{kind}-{digest(identity)}"
    for shared in [] if afresh else _finished_here(root, name):
        if shared.is_sound(between):
            return shared
    damage = ""
    while True:
        run = _lock_furthest(root, name, identity, afresh)
        with run.closed_on_error():
            try:
                run.take_up(between)
                break
            except ValueError as error:
                damage = damage or str(error)
                run.clear()
        run.close()
    if damage:
        then = "goes on with another one" if run.progress else "begins afresh"
        run.note = f"an earlier run was found, but {damage}: {then}"
    _open_here[run.folder] = run
    return run


def _lock_furthest(root: Path, name: str, identity: dict, clear: bool) -> Run:
    """The run that got furthest of those of a name that nobody uses; a new one where there is none.

    Args:
        clear: remove what all of them have done.
    """
    with FileLock(root / LOCK):  # held for moments only: every other server waits for it
        numbered = ((path, re.fullmatch(rf"{name}(?:-(\d+))?", path.name)) for path in root.iterdir())
        folders = {int(match[1] or 0): path for path, match in numbered if match}
        runs = [run for _, folder in sorted(folders.items()) if (run := _lock_unused(folder, identity))]
        if not runs:
            number = next(number for number in itertools.count() if number not in folders)
            folder = root / (f"{name}-{number}" if number else name)
            folder.mkdir()
            sync_folder(root)  # else the folder could be lost with all that is synced in it
            runs = [_lock_unused(folder, identity)]
        for run in runs if clear else ():
            run.clear()
        furthest = max(runs, key=Run.reached)
        for run in runs:
            if run is not furthest:
                run.close()
    return furthest


def _lock_unused(folder: Path, identity: dict) -> Run | None:
    """A run that stands in a folder, locked; None where it is in use."""
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return Run(folder, identity, lock)


def _finished_here(root: Path, name: str) -> list[Run]:
    """Finished runs of one identity that this process has open and locked."""
    of_name = [run for folder, run in _open_here.items() if folder.parent == root and folder.name.startswith(name)]
    return [run for run in of_name if run.finished and not run.closed]


def remove_old_runs(root: Path, needed: int = 0, max_bytes: int = MAX_BYTES, max_age: float = MAX_AGE) -> int:
    """Make room: remove runs unused for ``max_age`` seconds, and the longest unused ones beyond ``max_bytes`` in all.

    Nothing is touched that is in use, by any process, or that is not a run's folder. A run that alone takes more than
    ``max_bytes`` goes by its age or for ``needed`` only: room for it is not made by removing all others.

    Args:
        needed: bytes that are about to be written; where the disk has not as much free, more runs are removed, the
            longest unused first. Where that could not free enough, none is removed for any reason.

    Returns:
        Bytes of the runs that were left because removing them all would not have made room; else 0.
    """
    if not root.is_dir():
        return 0
    with FileLock(root / LOCK):
        found = [path for path in root.iterdir() if _FOLDER.fullmatch(path.name) and not path.is_symlink()]
        used = {folder: when for folder in found if (when := _last_use(folder)) is not None}
        sizes = {folder: _size(folder) for folder in used}
        free = shutil.disk_usage(root).free
        if needed > free:
            removable = sum(size for folder, size in sizes.items() if _is_unused(folder))
            if needed > free + removable:
                return removable
        total = sum(size for size in sizes.values() if size <= max_bytes)
        for folder in sorted(used, key=used.get):
            size = sizes[folder]
            expired, counted = time.time() - used[folder] > max_age, size <= max_bytes
            if (expired or needed > free or (counted and total > max_bytes)) and _remove(folder):
                free, total = free + size, total - size * counted
                logger.info("AdaFlow: removed the old run %s, %.1f MB", folder.name, size / 1e6)
    return 0


def _is_unused(folder: Path) -> bool:
    """Whether nobody has a run's folder locked; it stays so while the root's lock is held."""
    run = _lock_unused(folder, {})
    if run is not None:
        run.close()
    return run is not None


def _remove(folder: Path) -> bool:
    """Remove a run's folder unless it is in use; call it while holding the root's lock."""
    if not _is_unused(folder):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _last_use(folder: Path) -> float | None:
    """When a run was used last, in seconds since the epoch; None where it is gone meanwhile."""
    for path in (folder / MANIFEST, folder):
        with suppress(FileNotFoundError):
            return path.stat().st_mtime
    return None


def _size(folder: Path) -> int:
    """Bytes of a folder's files; what its owner renames or removes meanwhile does not count."""
    total = 0
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total
