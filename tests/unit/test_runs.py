"""Runs on disk: what they hold after any end, who may use them, when they go."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from adaflow_pack.adaflow import runs, storage
from adaflow_pack.adaflow.runs import FORMAT, LOCK, MANIFEST, DamagedRunError, Run, open_run, remove_old_runs
from adaflow_pack.adaflow.storage import SafetensorsReader, SafetensorsWriter, save_tensor
from filelock import FileLock

ME = {"steps": 3, "sigma": 0.1 + 0.2}


def step(run: Run, number: int, values: torch.Tensor) -> None:
    save_tensor(run.path(f"{number}.safetensors"), values, torch.float32)
    run.commit([f"{number}.safetensors"], [f"{number - 2}.safetensors"], step=number)


def begun(root, steps=3, identity=ME):
    """A run of some steps, closed; its folder and the values of its last step."""
    run = open_run(root, "edit", identity)
    for number in range(1, steps + 1):
        values = torch.randn(5, 7)
        step(run, number, values)
    run.close()
    return run.folder, values if steps else None


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_goes_on_where_it_was(tmp_path):
    folder, values = begun(tmp_path)
    again = open_run(tmp_path, "edit", dict(reversed(ME.items())))
    assert again.folder == folder and again.progress == {"step": 3} and not again.note
    assert torch.equal(SafetensorsReader(again.path("3.safetensors")).read("x", slice(None)), values)
    assert names(folder) == ["2.safetensors", "3.safetensors", "lock", MANIFEST]


def test_another_identity_is_another_run(tmp_path):
    folder, _ = begun(tmp_path)
    for identity in ({**ME, "steps": 4}, {**ME, "sigma": 0.3}, {**ME, "more": None}):
        other = open_run(tmp_path, "edit", identity)
        assert other.folder != folder and other.progress == {}
    assert open_run(tmp_path, "edit", ME, afresh=True).progress == {}
    assert names(folder) == ["lock"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << int(torch.randint(8, ()))
    path.write_bytes(data)


def edit_manifest(whole=True, **changes):
    """Change entries of a manifest, with a new checksum or under the old one."""

    def damage(folder):
        path = folder / MANIFEST
        manifest = {**json.loads(path.read_text()), **changes}
        old = manifest.pop("checksum")
        path.write_text(json.dumps({**manifest, "checksum": runs.digest(manifest) if whole else old}))

    return damage


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "3.safetensors", 40), "3.safetensors is missing or damaged"),
    "emptied": (lambda f: os.truncate(f / "2.safetensors", 0), "2.safetensors is missing or damaged"),
    "bit flipped": (lambda f: flip(f / "2.safetensors"), "2.safetensors is missing or damaged"),
    "removed": (lambda f: (f / "3.safetensors").unlink(), "3.safetensors is missing or damaged"),
    "an older format": (edit_manifest(format="adaflow-run-0"), f"its format is adaflow-run-0, not {FORMAT}"),
    "of other inputs": (edit_manifest(identity={}), "made from other inputs"),
    "no list of files": (edit_manifest(whole=False, files=None), "manifest is damaged"),
    "a step it never made": (edit_manifest(whole=False, progress={"step": 7}), "manifest is damaged"),
    "no manifest in it": (lambda f: (f / MANIFEST).write_text("[]"), "manifest is damaged"),
    "half a manifest": (lambda f: os.truncate(f / MANIFEST, 60), "manifest is damaged"),
    "not even text": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\0"), "manifest is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_begins_afresh_and_says_why(tmp_path, damage):
    folder, _ = begun(tmp_path)
    do, why = DAMAGE[damage]
    do(folder)
    run = open_run(tmp_path, "edit", ME)
    assert run.progress == {} and why in run.note and "begins afresh" in run.note
    assert names(folder) == ["lock"]
    step(run, 1, torch.zeros(2))
    run.close()
    assert open_run(tmp_path, "edit", ME).progress == {"step": 1}


def test_strays_of_a_broken_step_are_removed(tmp_path):
    folder, _ = begun(tmp_path)
    for name in ("4.safetensors", "5.safetensors.partial", MANIFEST + ".partial"):
        (folder / name).write_bytes(b"half")
    elsewhere = tmp_path / "elsewhere"
    for place in (elsewhere, folder / "4.safetensors.d", folder / "3.copy"):
        place.mkdir()
        (place / "file").write_text("x")
    (folder / "link").symlink_to(elsewhere)
    assert open_run(tmp_path, "edit", ME).progress == {"step": 3}
    assert names(folder) == ["2.safetensors", "3.safetensors", "lock", MANIFEST]
    assert names(elsewhere) == ["file"]


def test_the_folders_of_a_run_reach_the_disk_before_it_is_given(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.fstat(number).st_ino), fsync(number)))
    root = tmp_path / "runs"
    begun(root, steps=0)
    assert synced == [tmp_path.stat().st_ino, root.stat().st_ino]
    begun(root, steps=0)
    assert len(synced) == 2  # nothing new


def test_files_reach_the_disk_before_their_names_and_the_manifest_last(tmp_path, monkeypatch):
    run, events = open_run(tmp_path, "edit", ME), []
    replace = type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append("sync"))
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda self, target: (events.append(target.name), replace(self, target))[1]
    )
    step(run, 1, torch.zeros(2))
    assert events == ["sync", "1.safetensors", "sync", "sync", MANIFEST, "sync"]


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from conftest import mount_pack
from adaflow_pack.adaflow.runs import open_run
from pathlib import Path
run = open_run(Path(sys.argv[2]), "edit", {"steps": 3, "sigma": 0.1 + 0.2})
print(run.folder.name, flush=True)
time.sleep(60)
"""


@pytest.fixture
def other_process(root):
    """Opens the run of ``ME`` below a folder in another process, and returns that process and the folder's name."""
    started = []

    def hold(folder):
        command = [sys.executable, "-c", HOLD, str(root / "tests"), str(folder)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1], started[-1].stdout.readline().strip()

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_run_in_use_is_left_alone_until_its_process_is_gone(tmp_path, other_process):
    folder, _ = begun(tmp_path)
    process, name = other_process(tmp_path)
    assert name == folder.name
    remove_old_runs(tmp_path, max_bytes=0, max_age=-1.0)
    assert (folder / "3.safetensors").exists()
    run = open_run(tmp_path, "edit", ME)  # it gets a folder of its own, and the other one stays as it is
    assert run.folder.name == f"{folder.name}-1" and run.progress == {} and run.key == folder.name.split("-")[1]
    step(run, 1, torch.zeros(2))
    assert (folder / "3.safetensors").exists()
    process.kill()
    process.wait()
    assert open_run(tmp_path, "edit", ME).progress == {"step": 3}
    remove_old_runs(tmp_path, max_bytes=0, max_age=-1.0)
    assert names(tmp_path) == [run.folder.name, "lock"]


def siblings(root, *steps):
    """Folders of the run of ``ME``, each with so many steps done; the first is the base folder."""
    opened = [open_run(root, "edit", ME) for _ in steps]
    for run, count in zip(opened, steps, strict=True):
        for number in range(1, count + 1):
            step(run, number, torch.randn(5))
        run.close()
    return [run.folder for run in opened]


def opened(root, **options):
    """Folder, progress and note of the run of ``ME``, opened once more."""
    run = open_run(root, "edit", ME, **options)
    return run.folder, run.progress, run.note


def test_of_the_folders_of_a_run_the_furthest_is_taken(tmp_path):
    base, far, middle = siblings(tmp_path, 1, 9, 3)
    assert opened(tmp_path) == (far, {"step": 9}, "")
    run = open_run(tmp_path, "edit", ME)
    assert opened(tmp_path) == (middle, {"step": 3}, "")  # while that one is in use
    run.close()
    run = Run(base, json.loads(json.dumps(ME)), FileLock(base / LOCK))
    run.commit([], [], finished=True)
    assert opened(tmp_path) == (base, {"finished": True}, "")
    shutil.rmtree(base)
    assert opened(tmp_path) == (far, {"step": 9}, "")
    assert opened(tmp_path, afresh=True)[1:] == ({}, "")
    assert opened(tmp_path) == (far, {}, "")  # nothing of it comes back


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_whole_run_beside_a_damaged_one_is_taken(tmp_path, damage):
    base, whole, empty = siblings(tmp_path, 3, 2, 0)
    do, why = DAMAGE[damage]
    do(base)
    folder, progress, note = opened(tmp_path)
    assert folder == whole and progress == {"step": 2}
    assert not note or (why in note and "goes on with another one" in note)
    (whole / MANIFEST).write_text("{}")
    _, progress, note = opened(tmp_path)
    assert progress == {} and "begins afresh" in note
    assert opened(tmp_path)[1:] == ({}, "") and empty.exists()


def test_a_run_is_free_when_its_owner_is_dropped_or_closed(tmp_path):
    first = open_run(tmp_path, "edit", ME)
    second = open_run(tmp_path, "edit", ME)
    assert second.folder != first.folder
    name = first.folder
    del first
    third = open_run(tmp_path, "edit", ME)
    assert third.folder == name
    with pytest.raises(KeyError), third.closed_on_error():
        raise KeyError
    assert open_run(tmp_path, "edit", ME).folder == name


def test_a_finished_run_is_shared_in_its_process_while_it_is_sound(tmp_path):
    run = open_run(tmp_path, "edit", ME)
    step(run, 1, torch.zeros(2))
    assert open_run(tmp_path, "edit", ME) is not run  # it may still be written to
    run.commit([], [], step=1, finished=True)
    assert open_run(tmp_path, "edit", ME) is run
    anew = open_run(tmp_path, "edit", ME, afresh=True)
    assert anew.folder != run.folder and anew.progress == {}
    anew.close()
    run.path(MANIFEST).rename(tmp_path / "aside")
    assert open_run(tmp_path, "edit", ME) is not run
    (tmp_path / "aside").rename(run.path(MANIFEST))
    assert open_run(tmp_path, "edit", ME) is run
    flip(run.path("1.safetensors"))
    other = open_run(tmp_path, "edit", ME)
    assert other is not run and other.progress == {} and run.path("1.safetensors").exists()


def test_other_servers_need_not_wait_while_files_are_checked(tmp_path, monkeypatch):
    """The lock of the whole folder is free whenever a file is read, whether the run is taken up or shared."""
    begun(tmp_path)
    read, sums = [], storage.checksum

    def checksum(path, *args):
        with FileLock(tmp_path / LOCK, timeout=0):
            read.append(path.name)
        return sums(path, *args)

    monkeypatch.setattr(runs, "checksum", checksum)
    run = open_run(tmp_path, "edit", ME)
    assert read == ["2.safetensors", "3.safetensors"]
    run.commit([], [], step=3, finished=True)
    assert open_run(tmp_path, "edit", ME) is run
    assert read == ["2.safetensors", "3.safetensors"]  # nobody touched them, so they are not read again
    os.utime(run.path("3.safetensors"), (1, 1))
    assert open_run(tmp_path, "edit", ME) is run
    assert read == ["2.safetensors", "3.safetensors", "3.safetensors"]


def test_the_check_of_a_run_can_be_cancelled(tmp_path):
    folder, _ = begun(tmp_path)
    asked = []

    def cancel():
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        open_run(tmp_path, "edit", ME, between=cancel)
    run = open_run(tmp_path, "edit", ME)
    assert run.folder == folder and run.progress == {"step": 3}, caught
    run.commit([], [], step=3, finished=True)
    os.utime(run.path("2.safetensors"), (1, 1))
    del asked[1:]
    with pytest.raises(KeyboardInterrupt):
        open_run(tmp_path, "edit", ME, between=cancel)
    assert open_run(tmp_path, "edit", ME) is run


def test_a_file_touched_by_others_is_noticed_when_it_is_read(tmp_path):
    run = open_run(tmp_path, "edit", ME)
    step(run, 1, torch.randn(50))
    path = run.checked("1.safetensors")
    assert path == run.path("1.safetensors")
    path.write_bytes(path.read_bytes())  # the same again
    assert run.checked("1.safetensors") == path
    for damage in (flip, lambda file: os.truncate(file, 20), os.unlink):
        damage(path)
        with pytest.raises(DamagedRunError, match=r"1\.safetensors in .* is missing or damaged"):
            run.checked("1.safetensors")
    with pytest.raises(DamagedRunError):
        run.checked("never written")


def aged(root, sizes, monkeypatch, free=10**12):
    """Runs of so many kB, the first unused for longest; their folders."""
    folders = []
    for number, size in enumerate(sizes):
        run = open_run(root, "edit", {"number": number})
        step(run, 1, torch.zeros(size * 250))
        run.close()
        used = time.time() - 1000 * (len(sizes) - number)
        os.utime(run.path(MANIFEST), (used, used))
        folders.append(run.folder)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free})())
    return folders


def test_old_runs_go_by_age(tmp_path, monkeypatch):
    folders = aged(tmp_path, [1, 1, 1, 1], monkeypatch)
    remove_old_runs(tmp_path, max_age=2500.0)
    assert [folder.exists() for folder in folders] == [False, False, True, True]


def test_runs_go_by_size_the_longest_unused_first_and_make_room(tmp_path, monkeypatch):
    folders = aged(tmp_path, [20, 20, 20, 20], monkeypatch)
    run = open_run(tmp_path, "edit", {"number": 0})  # used again: now the youngest, and in use
    remove_old_runs(tmp_path, max_bytes=65_000, max_age=1e9)
    assert [folder.exists() for folder in folders] == [True, False, True, True]
    remove_old_runs(tmp_path, needed=10**9, max_bytes=65_000, max_age=1e9)  # what is to come has room on the disk
    assert [folder.exists() for folder in folders] == [True, False, True, True]
    run.close()
    used = time.time() - 5000
    os.utime(run.path(MANIFEST), (used, used))
    assert remove_old_runs(tmp_path, needed=10**12 + 1, max_age=1e9) == 0  # more than the disk has free
    assert [folder.exists() for folder in folders] == [False, False, True, True]  # one was enough
    assert remove_old_runs(tmp_path, needed=10**12 + 30_000, max_age=1e9) == 0
    assert names(tmp_path) == ["lock"]


def test_what_cannot_be_made_room_for_costs_no_run(tmp_path, monkeypatch):
    folders = aged(tmp_path, [20, 20, 20], monkeypatch)
    run = open_run(tmp_path, "edit", {"number": 1})
    removable = sum(path.stat().st_size for folder in (folders[0], folders[2]) for path in folder.iterdir())
    assert remove_old_runs(tmp_path, 10**12 + removable + 1, max_bytes=1000, max_age=-1.0) == removable
    assert all(folder.exists() for folder in folders)
    assert remove_old_runs(tmp_path, 10**12 + removable, max_age=1e9) == 0
    assert [folder.exists() for folder in folders] == [False, True, False]
    run.close()


def test_a_run_larger_than_all_may_take_does_not_remove_the_others(tmp_path, monkeypatch):
    folders = aged(tmp_path, [20, 90, 20, 20], monkeypatch)
    for use in (True, False):
        run = open_run(tmp_path, "edit", {"number": 1}) if use else None
        remove_old_runs(tmp_path, max_bytes=65_000, max_age=1e9)
        assert all(folder.exists() for folder in folders)
        del run
    remove_old_runs(tmp_path, max_bytes=45_000, max_age=1e9)
    assert [folder.exists() for folder in folders] == [False, True, True, True]


def test_what_other_processes_remove_meanwhile_is_passed_over(tmp_path, monkeypatch):
    """A folder is listed, and before its files are looked at their owner renames one or removes all."""
    folder, _ = begun(tmp_path)
    size, listed = Run(folder, ME, None).size(), type(tmp_path).iterdir
    gone = {tmp_path: f"edit-{'0' * 16}", folder: "4.safetensors.partial"}
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda self: [*listed(self), self / gone[self]])
    assert Run(folder, ME, None).size() == size
    remove_old_runs(tmp_path, max_bytes=size, max_age=1e9)
    assert folder.exists()
    remove_old_runs(tmp_path, max_age=-1.0)
    monkeypatch.undo()
    assert names(tmp_path) == ["lock"]


def test_nothing_else_in_the_folder_is_touched(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").mkdir()
    (tmp_path / "runs" / "mine" / "file").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    (tmp_path / "runs" / "edit-0123456789abcdef").symlink_to(tmp_path / "elsewhere")
    remove_old_runs(tmp_path / "runs", max_bytes=0, max_age=-1.0)
    assert len(list(tmp_path.rglob("file"))) == 2
    remove_old_runs(tmp_path / "not there")


def limited(code: str, tmp_path, root, prepare: str = "") -> subprocess.CompletedProcess:
    """Run code in a process of its own after ``prepare``; ``tmp_path`` and the storage functions are at hand."""
    head = f"""
import os, resource, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {str(root / "tests")!r})
from conftest import mount_pack
from adaflow_pack.adaflow.runs import open_run
from adaflow_pack.adaflow.storage import save_tensor
tmp_path = Path({str(tmp_path)!r})
{prepare}
"""
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True)


STEPS = """
run = open_run(tmp_path, "edit", {"steps": 3, "sigma": 0.1 + 0.2})
for number in range(1, 5):
    save_tensor(run.path(f"{number}.safetensors"), torch.full((number * 1000,), float(number)), torch.float32)
    run.commit([f"{number}.safetensors"], [], step=number)
"""


def test_a_full_disk_is_an_error_and_what_was_finished_stays(tmp_path, root):
    limit = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10000, -1))"
    done = limited(STEPS, tmp_path, root, limit)
    assert "OSError" in done.stderr and done.returncode == 1, done.stderr
    run = open_run(tmp_path, "edit", ME)
    assert run.progress == {"step": 2} and not run.note
    assert names(run.folder) == ["1.safetensors", "2.safetensors", "lock", MANIFEST]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs another user to lack permission")
def test_a_read_only_folder_is_an_error(tmp_path, root):
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    done = limited(STEPS, tmp_path, root, "os.setuid(65534)")
    assert "PermissionError" in done.stderr and str(tmp_path) in done.stderr, done.stderr
    assert names(tmp_path) == []


def test_a_file_is_filled_in_any_order(tmp_path):
    values = torch.randn(6, 3, 2)
    writer = SafetensorsWriter(tmp_path / "a.safetensors", {"h": (torch.float16, (6, 3, 2)), "i": (torch.int32, (4,))},
                               {"about": "ä"})  # fmt: skip
    writer.write("i", 1, torch.tensor([7, 8]))
    for first in (4, 0, 2):
        writer.write("h", first, values[first : first + 2])
    assert names(tmp_path) == ["a.safetensors.partial"]
    reader = SafetensorsReader(writer.close())
    assert torch.equal(reader.read("h", slice(None)), values.half())
    assert torch.equal(reader.read("h", [5, 1]), values.half()[[5, 1]])
    assert reader.read("i", slice(None)).tolist() == [0, 7, 8, 0]
    assert reader.metadata == {"about": "ä"} and reader.shape("h") == (6, 3, 2)
    discarded = SafetensorsWriter(tmp_path / "b.safetensors", {"h": (torch.float16, (2,))}, {})
    discarded.discard()
    assert names(tmp_path) == ["a.safetensors"]


def test_the_checksum_is_of_the_whole_file(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(3 << 20))
    before = storage.checksum(path)
    flip(path)
    assert storage.checksum(path) != before
