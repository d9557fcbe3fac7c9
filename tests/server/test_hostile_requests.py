"""Hostile requests over HTTP: refused before anything runs, and nothing is written outside ComfyUI's folders."""

import copy

import pytest
from comfy_client import PromptRejected
from server_graph import basic_prompt, node
from workflow_api import input_specs, with_defaults

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


# What no input of a type takes. Texts and numbers for a boolean, or anything short for a text, are not here: ComfyUI
# makes True or False, or a text, of them before it asks the node.
NUMBERS = [-1.5e300, 1e300, float("nan"), float("inf"), float("-inf"), "nan", -(2**63), 2**70, "many", None, {}, LONG]
CONSTANTS = {
    "INT": NUMBERS,
    "FLOAT": NUMBERS,
    "BOOLEAN": [],
    "STRING": [LONG],
    "COMBO": ["no_such_choice", "", LONG, 3, True, None, {"a": 1}, {"__value__": ["a", "b"]}, {"__value__": [["a"]]}],
}
SOCKET = ["x", "", LONG, 0, 1.5, True, None, {}, {"samples": 1}, {"__value__": None}, {"__value__": [["spare", 0]]}]
NO_LINKS = [
    [], ["spare"], ["spare", 0, 0], ["no such node", 0], ["spare", 99], ["spare", -99], ["spare", "0"], ["spare", None],
    ["spare", 0.5], ["spare", {}], [["spare"], 0], [{}, 0], [None, None], [0, 0], [LONG, 0], [[], []],
]  # fmt: skip


def hostile_values(spec) -> list:
    """What an input of that description must not take, other than ``NO_LINKS``."""
    other = ["spare", 1 if "MODEL" in spec.type.split(",") else 0]  # of the demo model's outputs, one of another type
    values = [other, *CONSTANTS.get(spec.type, SOCKET)]
    if spec.type in ("INT", "FLOAT"):
        values += [spec.options["min"] - 1, spec.options["max"] + (spec.options["max"] // 1000 or 1)]
    if spec.type not in ("STRING", "BOOLEAN"):
        values.append({"__value__": ["spare", 0]})  # a link that ComfyUI does not see as one before it runs
    return values


def pack_nodes(object_info) -> list[str]:
    return [name for name, info in object_info.items() if info["python_module"].endswith(".comfyui-adaflow")]


def sockets(name, object_info) -> list:
    return [spec for spec in input_specs(object_info[name]) if spec.required and not spec.is_widget]


def add_node(prompt, name, object_info, clip) -> None:
    """Put a node, named by its type, into the prompt, with those that its required sockets need."""
    prompt[name] = node(name, **({"file": clip} if name == "AdaFlowLoadVideo" else {}))
    makers = [maker for maker in pack_nodes(object_info) if not object_info[maker]["output_node"]]
    makers = ["CLIPTextEncode", *sorted(makers, key=lambda maker: bool(sockets(maker, object_info)))]  # sources first
    for spec in sockets(name, object_info):
        kinds = spec.type.split(",")
        maker = next(maker for maker in makers if set(object_info[maker]["output"]) & set(kinds))
        slot = next(slot for slot, kind in enumerate(object_info[maker]["output"]) if kind in kinds)
        prompt[name]["inputs"][spec.name] = [maker, slot]
        if maker not in prompt:
            add_node(prompt, maker, object_info, clip)


def prompt_of(name, object_info, clip) -> dict:
    """The smallest prompt with a node of that type, and a demo model ``spare``."""
    prompt = {"spare": node("AdaFlowLoadDemoModel")}
    add_node(prompt, name, object_info, clip)
    if not object_info[name]["output_node"]:
        prompt["sink"] = node("PreviewAny", source=[name, 0])
    return with_defaults(prompt, object_info)


def blames(error, key) -> bool:
    return error["extra_info"].get("input_name") == key or f"input '{key}' is" in error["details"]


def fault(server, prompt, name, key, value, named=True) -> str | None:
    """None if ComfyUI answers HTTP 400 and blames that node alone, for that input if ``named``; else what it did."""
    changed, what = copy.deepcopy(prompt), f"{name}.{key} = {value!r:.60}"
    changed[name]["inputs"][key] = value
    try:
        prompt_id = server.submit(changed)
    except PromptRejected as refusal:
        errors = refusal.node_errors[name]["errors"] if set(refusal.node_errors) == {name} else []
        blamed = errors and (not named or all(blames(error, key) for error in errors))
        own = [error["details"] for error in errors if error["type"] == "custom_validation_failed"]
        return None if refusal.error and blamed and len("".join(own)) < 20_000 else f"{what}: {refusal!s:.400}"
    server.request("/queue", {"delete": [prompt_id]})
    server.interrupt(prompt_id)
    return f"{what}: queued"


def test_every_input_of_every_node(server, clip, object_info, outside):
    """By the nodes' own descriptions, so that a node that comes to the pack is tested too."""
    names, before = pack_nodes(object_info), listing(server.base, outside)
    known = set(server.request("/history"))
    assert len(names) >= 12
    faults = []
    for name in names:
        prompt = prompt_of(name, object_info, clip)
        for spec in input_specs(object_info[name]):
            faults += [fault(server, prompt, name, spec.name, value) for value in hostile_values(spec)]
            faults += [fault(server, prompt, name, spec.name, value, named=False) for value in NO_LINKS]
        faults.append(fault(server, prompt, name, "no_such_input", ["spare", 0]))
    assert [text for text in faults if text] == []
    assert listing(server.base, outside) == before and set(server.request("/history")) == known


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
