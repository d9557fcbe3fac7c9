"""Hostile requests over HTTP: refused before anything runs, and nothing is written outside ComfyUI's folders."""

import copy

import pytest
from comfy_client import PromptRejected
from server_graph import basic_prompt

pytestmark = pytest.mark.server
LONG = "a" * 100_000


@pytest.fixture
def prompt(clip, object_info) -> dict:
    return basic_prompt(object_info, clip, frames=2, steps=1)


@pytest.fixture(scope="module")
def outside(server, tmp_path_factory):
    """A folder outside ComfyUI's, to which links in its folders lead, with a clip in it."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret.mp4").write_bytes(b"secret")
    for kind in ("input", "output", "temp"):
        (server.base / kind / "leak").symlink_to(folder, target_is_directory=True)
    (server.base / "input" / "leak.mp4").symlink_to(folder / "secret.mp4")
    return folder


def listing(*folders) -> list:
    return sorted(str(path) for folder in folders for path in folder.rglob("*") if "/custom_nodes/" not in str(path))


def refused(server, prompt, node, key) -> str:
    """ComfyUI's answer, HTTP 400; nothing has run, and no file is new."""
    before = listing(server.base)
    with pytest.raises(PromptRejected) as caught:
        server.run(prompt, timeout=120)
    assert node in caught.value.node_errors and key in str(caught.value)
    assert "root:" not in str(caught.value) and "secret" not in str(caught.value).replace("secret.mp4", "")
    assert listing(server.base) == before
    return str(caught.value)


FILES = [
    "../clip.mp4", "/etc/passwd", "\\etc\\passwd", "C:\\Windows\\win.ini", "..\\..\\clip.mp4", "clip.mp4/../../x",
    "leak.mp4", "leak/secret.mp4", "leak/secret.mp4 [output]", "leak/secret.mp4 [temp]", "~/clip.mp4",
    "file:///etc/passwd", "http://127.0.0.1/clip.mp4", "concat:/etc/passwd", "clip.mp4\0.txt", "/dev/zero",
    "/proc/self/environ", LONG, LONG + ".mp4", "a/" * 50_000, {"name": "clip.mp4"}, {"__value__": ["clip.mp4"]}, 7,
]  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda value: repr(value)[:24])
def test_files(server, prompt, outside, file):
    prompt["load"]["inputs"]["file"] = file
    assert len(refused(server, prompt, "load", "file")) < 20_000


PREFIXES = [
    "../outside", "/tmp/outside", "a/../../outside", "..\\outside", "leak/outside", "leak/new/outside", "a\0b", LONG,
    "b/" + LONG, "c/" * 50_000, "%date:yyyy%/../../outside",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda value: repr(value)[:24])
def test_prefixes(server, prompt, outside, prefix):
    before = listing(outside)
    prompt["save"]["inputs"]["filename_prefix"] = prefix
    refused(server, prompt, "save", "filename_prefix")
    assert listing(outside) == before and not list(server.base.glob("outside*"))


NUMBERS = [
    ("load", "first_frame"), ("load", "frame_count"), ("load", "stride"), ("load", "size"), ("load", "multiple"),
    ("encode", "chunk"), ("invert", "steps"), ("invert", "chunk"), ("select", "mean_threshold"),
    ("select", "window_threshold"), ("select", "max_clip"), ("select", "seed"), ("joint", "steps"), ("joint", "cfg"),
    ("joint", "seed"), ("joint", "feature_share"), ("joint", "attention_share"), ("propagate", "chunk"),
    ("save", "fps"), ("save", "quality"), ("save", "chunk"),
]  # fmt: skip
VALUES = [
    -1.5e300,
    1e300,
    float("nan"),
    float("inf"),
    float("-inf"),
    "nan",
    -(2**63),
    2**70,
    "many",
    [],
    {},
    {"a": 1},
    LONG,
]


@pytest.mark.parametrize(("node", "key"), NUMBERS)
def test_numbers(server, prompt, node, key):
    for value in VALUES:
        changed = copy.deepcopy(prompt)
        changed[node]["inputs"][key] = value
        refused(server, changed, node, key)


CHOICES = [
    ("invert", "precision"), ("invert", "resume"), ("select", "draw_mode"), ("joint", "sampler_name"),
    ("joint", "scheduler"), ("joint", "resume"), ("propagate", "resume"), ("save", "codec"),
]  # fmt: skip


@pytest.mark.parametrize(("node", "key"), CHOICES)
def test_choices(server, prompt, node, key):
    for value in ("no_such_choice", "", LONG, 3, {"a": 1}, {"__value__": ["a", "b"]}, {"__value__": [["h264"]]}):
        changed = copy.deepcopy(prompt)
        changed[node]["inputs"][key] = value
        assert len(refused(server, changed, node, key)) < 20_000


@pytest.mark.parametrize(
    "schedule", ["0, x", "-1", "9" * 5000, LONG, "1," * 100_000, "\u0661", "0\0"], ids=lambda v: repr(v)[:12]
)
def test_schedules(server, prompt, schedule):
    prompt["select"]["inputs"].update(draw_mode="schedule", schedule=schedule)
    refused(server, prompt, "select", "schedule")


def test_the_server_is_as_it_was(server, outside):
    """After all of the above: it answers, no prompt is left, and nothing stands outside."""
    queue = server.request("/queue")
    assert not queue["queue_running"] and not queue["queue_pending"]
    assert [path.name for path in outside.iterdir()] == ["secret.mp4"]
    for kind in ("input", "output", "temp"):
        (server.base / kind / "leak").unlink()
    (server.base / "input" / "leak.mp4").unlink()
