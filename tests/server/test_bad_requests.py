"""What no front end would send: refused before anything runs, or with an error that names the node and the input."""

import pytest
from comfy_client import ExecutionError, PromptRejected
from server_graph import basic_prompt

pytestmark = pytest.mark.server


def refused(server, prompt) -> str:
    """The text of ComfyUI's refusal, by HTTP 400 or by the node's own error."""
    with pytest.raises((PromptRejected, ExecutionError)) as caught:
        server.run(prompt, timeout=300)
    return str(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        "../clip.mp4",
        "sub/../../clip.mp4",
        "/etc/passwd",
        "..\\clip.mp4",
        "clip.mp4/../../server.log",
        "missing.mp4",
        "missing.mp4 [output]",
        "../../etc/passwd [temp]",
        "",
    ],
)
def test_a_path_outside_or_missing_is_refused_before_anything_runs(server, clip, object_info, file):
    prompt = basic_prompt(object_info, clip)
    prompt["load"]["inputs"]["file"] = file
    with pytest.raises(PromptRejected) as caught:
        server.run(prompt)
    assert "load" in caught.value.node_errors
    assert "file" in str(caught.value)
    assert "root:" not in str(caught.value), "the answer shows a file's content"


@pytest.mark.parametrize("prefix", ["../outside", "/tmp/outside", "video/../../outside"])
def test_a_file_is_not_saved_outside_the_output_folder(server, clip, object_info, prefix):
    prompt = basic_prompt(object_info, clip, frames=1, steps=1)
    prompt["save"]["inputs"].update(filename_prefix=prefix, frames=["encode", 0])
    message = refused(server, prompt)
    assert "filename_prefix" in message
    assert not list(server.base.glob("outside*"))


@pytest.mark.parametrize(
    ("node", "key", "value"),
    [
        ("load", "first_frame", -1),
        ("load", "frame_count", -5),
        ("load", "stride", 0),
        ("load", "size", -64),
        ("load", "first_frame", 10**9),
        ("load", "size", "wide"),
        ("encode", "chunk", -1),
        ("invert", "steps", 0),
        ("invert", "steps", 10**6),
        ("select", "mean_threshold", 1.5),
        ("select", "window_threshold", -2.0),
        ("select", "max_clip", 0),
        ("select", "seed", -1),
        ("joint", "cfg", -1.0),
        ("joint", "feature_share", 1.1),
        ("joint", "attention_share", -0.1),
        ("propagate", "chunk", -1),
        ("save", "fps", -1.0),
        ("save", "quality", 1000),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(server, clip, object_info, node, key, value):
    prompt = basic_prompt(object_info, clip)
    prompt[node]["inputs"][key] = value
    with pytest.raises(PromptRejected) as caught:
        server.run(prompt)
    assert node in caught.value.node_errors
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("node", "key"),
    [
        ("invert", "precision"),
        ("select", "draw_mode"),
        ("joint", "sampler_name"),
        ("joint", "scheduler"),
        ("save", "codec"),
    ],
)
def test_a_choice_that_is_not_in_the_list_is_refused_by_name(server, clip, object_info, node, key):
    """ComfyUI does not hold V3 combos against their lists: the nodes do."""
    prompt = basic_prompt(object_info, clip, frames=1, steps=1)
    prompt[node]["inputs"][key] = "no_such_choice"
    message = refused(server, prompt)
    assert f"node {node} " in message and key in message and "no_such_choice" in message


@pytest.mark.parametrize(
    ("node", "key"),
    [
        ("select", "mean_threshold"),
        ("select", "window_threshold"),
        ("joint", "cfg"),
        ("joint", "feature_share"),
        ("joint", "attention_share"),
        ("save", "fps"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), "nan", float("inf"), "-inf"], ids=str)
def test_nan_and_infinity_are_refused_by_name(server, clip, object_info, node, key, value):
    prompt = basic_prompt(object_info, clip, frames=1, steps=1)
    prompt[node]["inputs"][key] = value
    message = refused(server, prompt)
    assert f"node {node} " in message and key in message


def test_a_range_past_the_end_names_what_there_is(server, clip, object_info):
    prompt = basic_prompt(object_info, clip)
    prompt["load"]["inputs"].update(first_frame=500, frame_count=10)
    message = refused(server, prompt)
    assert "first_frame" in message and "500" in message and "12" in message


def test_a_file_that_is_no_video_is_named(server, clip, object_info):
    (server.base / "input" / "text.mp4").write_text("this is no video")
    message = refused(server, basic_prompt(object_info, "text.mp4"))
    assert "text.mp4" in message and "AdaFlow" in message


def test_more_steps_than_the_inversion_holds(server, clip, object_info):
    prompt = basic_prompt(object_info, clip, frames=2, steps=2)
    prompt["joint"]["inputs"]["steps"] = 5
    message = refused(server, prompt)
    assert "steps" in message and "5" in message and "AdaFlowJointKeyframeEdit" in message
