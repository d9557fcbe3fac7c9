"""Help pages as the front end shows them: behind the selected node's info button, as wide as their panel."""

import json
import os
import re
from pathlib import Path

import front_end
import pytest
from workflow_api import input_specs

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
NODES = re.findall(r"^    (AdaFlow\w+),$", (ROOT / "nodes" / "__init__.py").read_text(), re.M)


@pytest.fixture(scope="module")
def object_info(browser_server):
    return browser_server.object_info()


@pytest.fixture(scope="module")
def page(browser_server):
    with front_end.front_end(browser_server.url) as opened:
        opened.evaluate("() => window.app.graph.clear()")
        yield opened


def show_help(page, kind: str):
    """Add a node, select it and press its info button; the panel's content."""
    page.evaluate(
        """(kind) => {
        const node = LiteGraph.createNode(kind), canvas = window.app.canvas
        window.app.graph.clear()
        window.app.graph.add(node)
        node.pos = [700, 300]
        canvas.ds.scale = 1
        canvas.ds.offset = [0, 0]
        canvas.deselectAll()
        canvas.selectNode(node)
        canvas.setDirty(true, true)
        }""",
        kind,
    )
    page.locator("[data-testid=info-button]").first.click(timeout=20_000)
    content = page.locator(".node-help-content")
    content.get_by_role("heading", name="Where it sits").wait_for(timeout=20_000)
    return content


@pytest.mark.parametrize("kind", NODES)
def test_the_help_page_opens_and_names_every_input(page, object_info, kind):
    content = show_help(page, kind)
    title = object_info[kind]["display_name"]
    content.get_by_role("heading", name=title, exact=True, level=1).wait_for(timeout=20_000)
    text = content.inner_text()
    missing = [spec.name for spec in input_specs(object_info[kind]) if spec.name not in text]
    assert missing == []
    missing = [name for name in object_info[kind]["output_name"] if name not in text]
    assert missing == [], json.dumps(object_info[kind]["output_name"])
    wide, panel = content.evaluate("element => [element.scrollWidth, element.clientWidth]")
    assert wide <= panel + 1, "the page is cut off at the side"
    folder = os.environ.get("ADAFLOW_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"help-{kind}.png"))
