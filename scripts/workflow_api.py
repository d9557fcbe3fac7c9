"""Turns a workflow as the front end saves it into the form that ComfyUI's ``POST /prompt`` takes, and edits that form.

The saved form lists the values of a node's widgets without names, in the order in which the front end shows them; which
widgets a node has is known from ``GET /object_info`` only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Prompt = dict[str, dict]

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
CONTROL_VALUES = {"fixed", "increment", "decrement", "randomize"}
UPLOADS = ("image_upload", "video_upload", "audio_upload", "file_upload", "animated_image_upload")
VIRTUAL = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
NEVER, BYPASS = 2, 4  # a node's mode in the front end


class WorkflowError(ValueError):
    """The workflow cannot be submitted; the message names the node."""


@dataclass
class InputSpec:
    """One input of a node type, as ``/object_info`` describes it."""

    name: str
    type: str
    options: dict = field(default_factory=dict)
    required: bool = True
    is_widget: bool = False

    @property
    def uploads(self) -> bool:
        return any(self.options.get(key) for key in UPLOADS)

    @property
    def may_be_controlled(self) -> bool:
        """Whether the front end adds "control after generate" below, which is saved as a value of its own."""
        named = self.type == "INT" and self.name in ("seed", "noise_seed")
        return named or bool(self.options.get("control_after_generate"))


def input_specs(info: dict) -> list[InputSpec]:
    """The inputs of a node type in the front end's order, from its entry in ``/object_info``."""
    specs = []
    for group in ("required", "optional"):
        entries = info["input"].get(group) or {}
        order = (info.get("input_order") or {}).get(group) or list(entries)
        for name in order:
            kind, *rest = entries[name] if isinstance(entries[name], (list, tuple)) else [entries[name]]
            options = dict(rest[0]) if rest and isinstance(rest[0], dict) else {}
            if isinstance(kind, list):
                kind, options = "COMBO", {**options, "options": kind}
            widget = kind in WIDGET_TYPES and not options.get("forceInput") and not options.get("rawLink")
            specs.append(InputSpec(name, kind, options, group == "required", widget))
    return specs


def default_value(spec: InputSpec):
    """What the front end puts in a new widget."""
    if "default" in spec.options:
        return spec.options["default"]
    if spec.type == "COMBO":
        return next(iter(spec.options.get("options") or []), None)
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[spec.type]


def widget_values(node: dict, specs: list[InputSpec]) -> dict:
    """The node's widget values by name. Values that only the front end uses are left out."""
    saved, widgets = node.get("widgets_values"), [spec for spec in specs if spec.is_widget]
    if isinstance(saved, dict):
        return {spec.name: saved[spec.name] for spec in widgets if spec.name in saved}
    values, queue = {}, list(saved or [])
    for index, spec in enumerate(widgets):
        if not queue:
            break
        values[spec.name] = queue.pop(0)
        left = len(widgets) - index - 1
        # In old files the control is a boolean.
        if spec.may_be_controlled and queue and (queue[0] in CONTROL_VALUES or isinstance(queue[0], bool)):
            queue.pop(0)
        if spec.uploads and len(queue) > left and (queue[0] is None or isinstance(queue[0], str)):
            queue.pop(0)
    return values


class _Graph:
    """A saved workflow with its links resolved through what only the front end knows."""

    def __init__(self, workflow: dict, object_info: dict):
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.info = object_info
        self.links = {}
        for link in workflow.get("links") or []:
            if isinstance(link, dict):
                link = [link[key] for key in ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")]
            self.links[link[0]] = (link[1], link[2])

    def source(self, link: int | None):
        """``[node id, output slot]``, ``("value", value)`` of a primitive, or None where the link leads nowhere."""
        seen = set()
        while link is not None and link in self.links and link not in seen:
            seen.add(link)
            origin, slot = self.links[link]
            node = self.nodes.get(origin)
            if node is None or node.get("mode") == NEVER:
                return None
            if node["type"] == "PrimitiveNode":
                return ("value", node["widgets_values"][0])
            if node["type"] == "Reroute":
                link = node["inputs"][0].get("link")
            elif node.get("mode") == BYPASS:
                link = self._bypassed(node, slot)
            else:
                return [str(origin), slot]
        return None

    def _bypassed(self, node: dict, slot: int) -> int | None:
        """The link that a bypassed node hands on at an output: its input of the same type."""
        kind = node["outputs"][slot]["type"]
        same = [entry for entry in node.get("inputs") or [] if entry["type"] == kind]
        return same[0].get("link") if same else None


def workflow_to_api(workflow: dict, object_info: dict) -> Prompt:
    """The prompt that the front end would submit for a saved ``workflow``.

    Args:
        workflow: the JSON of a saved workflow (``nodes``, ``links``).
        object_info: the answer of ``GET /object_info``.

    Raises:
        WorkflowError: an unknown node type, a required input without a value, or a subgraph.
    """
    if (workflow.get("definitions") or {}).get("subgraphs"):
        raise WorkflowError("the workflow has subgraphs, which are not supported here")
    graph, prompt = _Graph(workflow, object_info), {}
    for node in workflow["nodes"]:
        kind = node["type"]
        if kind in VIRTUAL or node.get("mode") in (NEVER, BYPASS):
            continue
        label = f"node {node['id']} ({kind})"
        if kind not in object_info:
            raise WorkflowError(f"{label} is not a node type of this ComfyUI")
        specs = input_specs(object_info[kind])
        inputs = {spec.name: default_value(spec) for spec in specs if spec.is_widget and spec.required}
        inputs.update(widget_values(node, specs))
        for entry in node.get("inputs") or []:
            source = graph.source(entry.get("link"))
            if isinstance(source, tuple):
                inputs[entry["name"]] = source[1]
            elif source is not None:
                inputs[entry["name"]] = source
        missing = [spec.name for spec in specs if spec.required and spec.name not in inputs]
        if missing:
            raise WorkflowError(f"{label} has nothing at its input {', '.join(missing)}")
        title = node.get("title") or object_info[kind].get("display_name") or kind
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def with_defaults(prompt: Prompt, object_info: dict) -> Prompt:
    """The prompt with every required widget that it leaves out at its default."""
    filled = {}
    for key, node in prompt.items():
        specs = input_specs(object_info[node["class_type"]])
        defaults = {spec.name: default_value(spec) for spec in specs if spec.is_widget and spec.required}
        filled[key] = {**node, "inputs": {**defaults, **node["inputs"]}}
    return filled


def find_nodes(prompt: Prompt, name: str) -> list[str]:
    """Ids of the nodes whose type or title is ``name``."""
    return [key for key, node in prompt.items() if name in (node["class_type"], node.get("_meta", {}).get("title"))]


def set_input(prompt: Prompt, name: str, key: str, value) -> int:
    """Set an input of every node of type or title ``name``; the number of nodes that were set."""
    found = find_nodes(prompt, name)
    for node in found:
        prompt[node]["inputs"][key] = value
    return len(found)


def swap_node(prompt: Prompt, name: str, class_type: str, inputs: dict) -> int:
    """Put another node in place of those of type or title ``name``, with the same outputs in the same order."""
    found = find_nodes(prompt, name)
    for node in found:
        prompt[node] = {"class_type": class_type, "inputs": dict(inputs), "_meta": {"title": class_type}}
    return len(found)


def upstream(prompt: Prompt, node: str, key: str, class_type: str) -> str | None:
    """The nearest node of a type that feeds an input, through any nodes between (first inputs first)."""
    queue, seen = [prompt[node]["inputs"].get(key)], set()
    while queue:
        link = queue.pop(0)
        if not isinstance(link, list) or link[0] in seen or link[0] not in prompt:
            continue
        seen.add(link[0])
        if prompt[link[0]]["class_type"] == class_type:
            return link[0]
        # a conditioning node hands on the conditioning of its own name: positive through positive
        onward = prompt[link[0]]["inputs"]
        queue.extend([onward[key]] if key in onward else list(onward.values()))
    return None
