"""Both supported ComfyUI versions load the pack, list its nodes, and serve its workflows and help pages."""

import re
import urllib.error

import pytest
from comfy_client import PACK_NAME

pytestmark = pytest.mark.server


def node_ids(root) -> list[str]:
    """The classes that nodes/__init__.py lists, which carry the node's id as their name."""
    text = (root / "nodes" / "__init__.py").read_text()
    return re.findall(r"^    (AdaFlow\w+),$", text, re.M)


def test_every_node_is_listed_with_a_tooltip_at_every_input(any_server, root):
    ids = node_ids(root)
    assert len(ids) >= 11
    info = any_server.object_info()
    assert sorted(set(ids) - set(info)) == [], any_server.log_tail()
    bare = []
    for name in ids:
        assert info[name]["description"], name
        for group in ("required", "optional"):
            for key, entry in (info[name]["input"].get(group) or {}).items():
                if len(entry) < 2 or not entry[1].get("tooltip"):
                    bare.append(f"{name}.{key}")
        assert info[name]["category"].startswith("AdaFlow")
    assert bare == []


def test_the_log_has_no_failed_import_of_the_pack(any_server):
    log = any_server.log_text()
    assert f"{PACK_NAME}" in log
    failed = [line for line in log.splitlines() if "IMPORT FAILED" in line and PACK_NAME in line]
    assert failed == [], log
    assert f"Cannot import {any_server.base}" not in log


def test_the_workflows_are_listed_as_templates_and_served(any_server, root):
    names = sorted(path.stem for path in (root / "workflows").glob("*.json"))
    if not names:
        pytest.skip("workflows/ is empty")
    assert sorted(any_server.request("/workflow_templates").get(PACK_NAME, [])) == names
    for name in names:
        assert any_server.request(f"/api/workflow_templates/{PACK_NAME}/{name}.json")["nodes"]
        picture = any_server.read(f"/api/workflow_templates/{PACK_NAME}/{name}.jpg")
        assert picture[:2] == b"\xff\xd8"


def test_every_node_has_a_help_page(any_server, root):
    missing = []
    for name in node_ids(root):
        try:
            page = any_server.read(f"/extensions/{PACK_NAME}/docs/{name}.md").decode()
            assert len(page) > 100 and page.startswith("#"), name
        except urllib.error.HTTPError:
            missing.append(name)
    assert missing == []
