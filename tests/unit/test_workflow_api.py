"""Saved workflows become the prompt that the front end would send."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from workflow_api import (
    WorkflowError,
    find_nodes,
    set_input,
    swap_node,
    upstream,
    with_defaults,
    workflow_to_api,
)

INFO = {
    "Loader": {
        "input": {"required": {"file": [["a.mp4", "b.mp4"], {"video_upload": True}], "first": ["INT", {"default": 3}]}},
        "display_name": "Load it",
    },
    "Sampler": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"control_after_generate": True}],
                "steps": ["INT", {"default": 20}],
                "mode": ["COMBO", {"options": ["x", "y"], "default": "y"}],
                "positive": ["CONDITIONING"],
            },
            "optional": {"text": ["STRING", {"default": ""}], "image": ["IMAGE"]},
        },
        "input_order": {"required": ["model", "seed", "steps", "mode", "positive"], "optional": ["text", "image"]},
    },
    "Encode": {"input": {"required": {"clip": ["CLIP"], "text": ["STRING", {"multiline": True}]}}},
    "Apply": {"input": {"required": {"positive": ["CONDITIONING"], "hint": ["IMAGE"]}}},
    "Ckpt": {"input": {"required": {"name": [["m.safetensors"]]}}},
}


def node(number, kind, values=None, inputs=(), outputs=(), **more):
    entries = [{"name": name, "type": type_, "link": link} for name, type_, link in inputs]
    return {
        "id": number,
        "type": kind,
        "inputs": entries,
        "outputs": [{"type": type_} for type_ in outputs],
        "widgets_values": values,
        **more,
    }


def workflow(*extra, sampler_values=(7, "randomize", 12, "x", "hello"), reroute=False, mode=0):
    return {
        "nodes": [
            node(1, "Ckpt", ["m.safetensors"], outputs=["MODEL", "CLIP"]),
            node(2, "Encode", ["a cat"], [("clip", "CLIP", 11)], ["CONDITIONING"], title="Positive"),
            node(
                3, "Apply", None, [("positive", "CONDITIONING", 12), ("hint", "IMAGE", 13)], ["CONDITIONING"], mode=mode
            ),
            node(4, "Loader", ["b.mp4", "image", 5], outputs=["IMAGE"]),
            node(5, "Sampler", list(sampler_values), [("model", "MODEL", 14), ("positive", "CONDITIONING", 15)]),
            node(6, "MarkdownNote", ["read me"]),
            *extra,
        ],
        "links": [
            [11, 1, 1, 2, 0, "CLIP"],
            [12, 2, 0, 3, 0, "CONDITIONING"],
            [13, 4, 0, 3, 1, "IMAGE"],
            [14, 1, 0, 5, 0, "MODEL"],
            [15, 3, 0, 5, 4, "CONDITIONING"],
        ],
    }


def test_widgets_get_their_names_and_links_their_sources():
    prompt = workflow_to_api(workflow(), INFO)
    assert set(prompt) == {"1", "2", "3", "4", "5"}
    assert prompt["4"]["inputs"] == {"file": "b.mp4", "first": 5}
    assert prompt["5"]["inputs"] == {
        "seed": 7,
        "steps": 12,
        "mode": "x",
        "text": "hello",
        "model": ["1", 0],
        "positive": ["3", 0],
    }
    assert prompt["2"]["_meta"]["title"] == "Positive" and prompt["4"]["_meta"]["title"] == "Load it"


def test_a_bypassed_node_hands_on_and_a_muted_one_is_missed():
    prompt = workflow_to_api(workflow(mode=4), INFO)
    assert "3" not in prompt and prompt["5"]["inputs"]["positive"] == ["2", 0]
    with pytest.raises(WorkflowError, match=r"node 5 \(Sampler\).*positive"):
        workflow_to_api(workflow(mode=2), INFO)


def test_reroutes_and_primitives_are_resolved():
    saved = workflow()
    saved["nodes"] += [
        node(8, "Reroute", None, [("", "*", 14)], ["MODEL"]),
        node(9, "PrimitiveNode", [33, "fixed"], outputs=["INT"]),
    ]
    saved["links"] += [[16, 8, 0, 5, 0, "MODEL"], [17, 9, 0, 5, 2, "INT"]]
    sampler = saved["nodes"][4]
    sampler["inputs"][0]["link"] = 16
    sampler["inputs"].append({"name": "steps", "type": "INT", "link": 17, "widget": {"name": "steps"}})
    inputs = workflow_to_api(saved, INFO)["5"]["inputs"]
    assert inputs["model"] == ["1", 0] and inputs["steps"] == 33


def test_fewer_values_than_widgets_leave_defaults_and_names_are_taken_as_they_are():
    inputs = workflow_to_api(workflow(sampler_values=(7, "fixed", 12)), INFO)["5"]["inputs"]
    assert inputs["mode"] == "y" and "text" not in inputs
    saved = workflow()
    saved["nodes"][4]["widgets_values"] = {"seed": 1, "steps": 2, "mode": "x", "preview": "none"}
    inputs = workflow_to_api(saved, INFO)["5"]["inputs"]
    assert (inputs["seed"], inputs["steps"], inputs["mode"]) == (1, 2, "x") and "preview" not in inputs


def test_unknown_nodes_and_subgraphs_are_named():
    with pytest.raises(WorkflowError, match=r"node 7 \(Nowhere\)"):
        workflow_to_api(workflow(node(7, "Nowhere")), INFO)
    with pytest.raises(WorkflowError, match="subgraphs"):
        workflow_to_api({**workflow(), "definitions": {"subgraphs": [{}]}}, INFO)


def test_changes_by_type_or_title():
    prompt = workflow_to_api(workflow(), INFO)
    assert find_nodes(prompt, "Positive") == find_nodes(prompt, "Encode") == ["2"]
    assert set_input(prompt, "Load it", "file", "c.mp4") == 1 and prompt["4"]["inputs"]["file"] == "c.mp4"
    assert swap_node(prompt, "Ckpt", "Demo", {"seed": 1}) == 1
    assert prompt["1"]["class_type"] == "Demo" and prompt["5"]["inputs"]["model"] == ["1", 0]
    assert upstream(prompt, "5", "positive", "Encode") == "2"
    assert upstream(prompt, "5", "positive", "Missing") is None
    assert with_defaults({"1": {"class_type": "Sampler", "inputs": {}}}, INFO)["1"]["inputs"] == {
        "seed": 0,
        "steps": 20,
        "mode": "y",
    }
