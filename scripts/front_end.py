"""Drives ComfyUI's real front end in Chromium."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
READY = "() => window.app && window.app.graph && window.app.vueAppReady !== false && document.querySelector('canvas')"


@contextmanager
def front_end(url: str, width: int = 1920, height: int = 1080):
    """A page with the front end loaded and its first-run dialogs out of the way."""
    from playwright.sync_api import sync_playwright

    _skip_welcome(url)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": height})
        try:
            page.goto(url)
            page.wait_for_function(READY, timeout=120_000)
            page.wait_for_timeout(3_000)
            yield page
        finally:
            browser.close()


def _skip_welcome(url: str) -> None:
    """Tell the server that this user has seen the template browser, which otherwise opens on a first visit."""
    request = urllib.request.Request(
        f"{url}/settings/Comfy.TutorialCompleted",
        data=b"true",
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    with urllib.request.urlopen(request):
        pass


def load_workflow(page, path: Path) -> None:
    """Open a saved workflow as the menu's Open does."""
    page.evaluate("async (graph) => { await window.app.loadGraphData(graph) }", json.loads(path.read_text()))
    page.wait_for_timeout(1_500)


def fit_view(page) -> tuple[float, float, float, float]:
    """Zoom so that the whole graph is in sight; its left, top, right and bottom on the page, in pixels."""
    edges = page.evaluate(
        """() => {
        const nodes = window.app.graph._nodes, canvas = window.app.canvas
        const left = Math.min(...nodes.map(n => n.pos[0])) - 40, top = Math.min(...nodes.map(n => n.pos[1])) - 90
        const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0])) + 40
        const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1])) + 40
        const box = canvas.canvas.getBoundingClientRect()
        const wide = box.width - 140, tall = box.height - 180
        const scale = Math.min(wide / (right - left), tall / (bottom - top))
        canvas.ds.scale = scale
        canvas.ds.offset = [-left + 90 / scale, -top + 130 / scale]
        canvas.setDirty(true, true)
        return [90, 130, 90 + (right - left) * scale, 130 + (bottom - top) * scale]
            .map((edge, i) => edge + (i % 2 ? box.top : box.left))
        }"""
    )
    page.wait_for_timeout(1_000)
    return tuple(edges)


def node_types(page) -> list[str]:
    return page.evaluate("() => window.app.graph._nodes.map(n => n.type)")


def set_widget(page, kind: str, name: str, value) -> int:
    """Set a widget of every node of a type; returns how many were set."""
    return page.evaluate(
        """([kind, name, value]) => {
        let count = 0
        for (const node of window.app.graph._nodes.filter(n => n.type === kind))
            for (const widget of (node.widgets || []).filter(w => w.name === name)) {
                widget.value = value
                widget.callback?.(value)
                count += 1
            }
        return count
        }""",
        [kind, name, value],
    )


def swap_node(page, old: str, new: str) -> None:
    """Replace a node by one with the same outputs, keeping its wires."""
    page.evaluate(
        """([old, fresh]) => {
        const graph = window.app.graph, was = graph._nodes.find(n => n.type === old)
        const node = LiteGraph.createNode(fresh)
        node.pos = [...was.pos]
        graph.add(node)
        was.outputs.forEach((output, slot) => {
            for (const id of [...(output.links || [])]) {
                const link = graph.links[id] || graph.links.get(id)
                node.connect(slot, graph.getNodeById(link.target_id), link.target_slot)
            }
        })
        graph.remove(was)
        }""",
        [old, new],
    )


def queue_and_wait(page, timeout_s: float) -> str:
    """Press Run, wait for the end; returns "success", or the error that the front end was told."""
    page.evaluate(
        """() => {
        window.adaflowEnd = null
        const api = window.app.api
        api.addEventListener('execution_success', () => { window.adaflowEnd = 'success' })
        api.addEventListener('execution_error', e => { window.adaflowEnd = e.detail.exception_message })
        }"""
    )
    page.evaluate("async () => { await window.app.queuePrompt(0) }")
    page.wait_for_function("() => window.adaflowEnd", timeout=timeout_s * 1000)
    return page.evaluate("() => window.adaflowEnd")
