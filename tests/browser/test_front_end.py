"""The pack in ComfyUI's real front end: templates, graph, help page, and an edit run from the page."""

import json
import os
from pathlib import Path

import front_end
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.browser, pytest.mark.timeout(1500)]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


@pytest.fixture(scope="module")
def page(browser_server):
    with front_end.front_end(browser_server.url) as opened:
        yield opened


@pytest.fixture
def shot(page, request, tmp_path):
    """Keeps a screenshot of the page as the test left it, under ``$ADAFLOW_SCREENSHOTS`` if that is set."""
    yield
    folder = Path(os.environ.get("ADAFLOW_SCREENSHOTS", tmp_path))
    page.screenshot(path=str(folder / f"{request.node.name}.png"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_opens_with_all_its_nodes(page, shot, path):
    front_end.load_workflow(page, path)
    front_end.fit_view(page)
    kinds = front_end.node_types(page)
    assert any(kind.startswith("AdaFlow") for kind in kinds)
    registered = page.evaluate("() => Object.keys(LiteGraph.registered_node_types)")
    assert set(kinds) <= set(registered) | {"MarkdownNote"}
    assert "missing node" not in page.inner_text("body").lower()
    overlapping = page.evaluate(
        """() => {
        const boxes = window.app.graph._nodes.map(n => [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30, n.type])
        const found = []
        for (const a of boxes) for (const b of boxes)
            if (a !== b && a[0] < b[0] + b[2] && b[0] < a[0] + a[2] && a[1] < b[1] + b[3] && b[1] < a[1] + a[3])
                found.push(a[4] + ' / ' + b[4])
        return found
        }"""
    )
    assert not overlapping


def test_a_workflow_saved_before_the_inversion_had_rounds_opens_without_any(page, tmp_path):
    """Values are saved in the order of the widgets, without names: what is new stands last and keeps its default."""
    saved = json.loads((ROOT / "workflows" / "adaflow-basic-edit.json").read_text())
    (node,) = (node for node in saved["nodes"] if node["type"] == "AdaFlowDDIMInvert")
    node["widgets_values"] = [31, "float32", 7, "start afresh"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(saved))
    front_end.load_workflow(page, path)
    values = page.evaluate(
        """async () => {
        const prompt = (await window.app.graphToPrompt()).output
        return Object.values(prompt).find(node => node.class_type === 'AdaFlowDDIMInvert').inputs
        }"""
    )
    wanted = {"steps": 31, "precision": "float32", "chunk": 7, "resume": "start afresh", "refine": 0}
    assert {name: values[name] for name in wanted} == wanted


def test_the_template_browser_lists_the_workflows(page, browser_server):
    listed = page.evaluate("async () => (await window.app.api.fetchApi('/workflow_templates')).json()")
    ours = next(names for names in listed.values() if "adaflow-basic-edit" in names)
    assert {path.stem for path in WORKFLOWS} <= set(ours)
    pack = next(name for name, names in listed.items() if "adaflow-basic-edit" in names)
    for path in WORKFLOWS:
        for suffix in (".json", ".jpg"):
            status = page.evaluate(
                "async (route) => (await window.app.api.fetchApi(route)).status",
                f"/workflow_templates/{pack}/{path.stem}{suffix}",
            )
            assert status == 200, path.stem + suffix


def test_an_edit_runs_from_the_page(page, shot, browser_server):
    """The basic workflow, its checkpoint loader swapped for the demo model, on a small clip, started with Run."""
    front_end.load_workflow(page, ROOT / "workflows" / "adaflow-basic-edit.json")
    front_end.swap_node(page, "CheckpointLoaderSimple", "AdaFlowLoadDemoModel")
    assert front_end.set_widget(page, "AdaFlowLoadVideo", "file", "clip.mp4") == 1
    assert front_end.set_widget(page, "AdaFlowLoadVideo", "size", 128) == 1
    for kind in ("AdaFlowDDIMInvert", "AdaFlowJointKeyframeEdit"):
        assert front_end.set_widget(page, kind, "steps", 3) == 1
    assert front_end.queue_and_wait(page, 900) == "success"
    page.wait_for_timeout(3_000)
    front_end.fit_view(page)
    assert list((browser_server.base / "output" / "video").glob("AdaFlow*.mp4"))
    shown = page.evaluate("() => Object.keys(window.app.nodeOutputs).length")
    assert shown >= 3  # the y-t picture, the keyframes, the video
