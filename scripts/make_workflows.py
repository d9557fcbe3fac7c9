"""Writes the files in ``workflows/``: laid out by code, so that they change with the nodes.

    python scripts/make_workflows.py OBJECT_INFO.json

``OBJECT_INFO.json`` is the answer of ``GET /object_info`` of a ComfyUI with this pack: widgets, sockets and defaults
are read from there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from demo_clip import DEMO_STEPS, demo_clip, demo_settings
from workflow_api import default_value, input_specs

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "a wooden boat on a lake in summer, green trees, photo"
EDIT = "a wooden boat on a frozen lake in winter, snow on the trees, photo"
NEGATIVE = "ugly, blurry, low res, unrealistic, unaesthetic"
DEMO_EDIT = demo_clip().edited(colour="blue").caption()
CHECKPOINT, CONTROLNET = "v1-5-pruned-emaonly-fp16.safetensors", "control_v11p_sd15_canny_fp16.safetensors"
WIDGET_HEIGHT, SLOT_HEIGHT, GAP = 26, 21, 60
TEXT, PICTURE = 100, 250  # of up to five lines that say what is needed and how long it takes; of a picture
PREVIEW = 220  # where ComfyUI shows one while it samples
SHOWS = {  # what a node shows below its widgets
    "PreviewImage": PICTURE,
    "AdaFlowLoadVideo": PICTURE + 50,
    "AdaFlowEncodeVideo": TEXT // 2,
    "AdaFlowDDIMInvert": TEXT + PREVIEW,
    "AdaFlowKeyframeSelect": PICTURE + 50,
    "AdaFlowJointKeyframeEdit": PICTURE + TEXT,
    "AdaFlowTokenPropagate": TEXT + PREVIEW,
    "AdaFlowSaveVideo": PICTURE + TEXT,
}


class Node:
    """One node of a workflow under construction; ``out(name)`` is what other nodes wire to."""

    def __init__(self, graph: Workflow, number: int, kind: str, info: dict, widgets: dict, title: str | None):
        self.graph, self.id, self.kind, self.info, self.title = graph, number, kind, info, title
        self.specs = input_specs(info)
        unknown = set(widgets) - {spec.name for spec in self.specs}
        if unknown:
            raise ValueError(f"{kind} has no input {', '.join(sorted(unknown))}")
        self.widgets = widgets
        self.links: dict[str, int] = {}
        self.outgoing: dict[int, list[int]] = {}

    def out(self, name: str) -> tuple[Node, int]:
        return self, self.info["output_name"].index(name)

    def height(self) -> int:
        widgets = sum(1 + spec.may_be_controlled for spec in self.specs if spec.is_widget)
        slots = max(sum(not spec.is_widget for spec in self.specs), len(self.info["output"]))
        extra = sum(70 for spec in self.specs if spec.options.get("multiline"))
        shows = SHOWS.get(self.kind, 0)
        return 40 + widgets * WIDGET_HEIGHT + slots * SLOT_HEIGHT + extra + shows

    def values(self) -> list:
        out = []
        for spec in self.specs:
            if spec.is_widget:
                out.append(self.widgets.get(spec.name, default_value(spec)))
                if spec.may_be_controlled:
                    out.append("fixed")
        if any(spec.uploads for spec in self.specs):  # the front end puts the upload button last
            out.append("image")
        return out

    def as_json(self, pos: tuple[int, int], order: int, width: int) -> dict:
        inputs = []
        for spec in self.specs:
            if spec.is_widget and spec.name not in self.links:
                continue
            entry = {"name": spec.name, "type": spec.type, "link": self.links.get(spec.name)}
            if spec.is_widget:
                entry["widget"] = {"name": spec.name}
            elif not spec.required:
                entry["shape"] = 7
            inputs.append(entry)
        outputs = [
            {"name": name, "type": kind, "links": self.outgoing.get(slot) or None}
            for slot, (name, kind) in enumerate(zip(self.info["output_name"], self.info["output"], strict=True))
        ]
        return {
            "id": self.id,
            "type": self.kind,
            "pos": list(pos),
            "size": [width, self.height()],
            "flags": {},
            "order": order,
            "mode": 0,
            **({"title": self.title} if self.title else {}),
            "inputs": inputs,
            "outputs": outputs,
            "properties": {"Node name for S&R": self.kind},
            "widgets_values": self.values(),
        }


class Workflow:
    """Nodes in columns, left to right; each column is a stage with a titled group around it."""

    def __init__(self, object_info: dict):
        self.object_info = object_info
        self.columns: list[tuple[str, int, list[Node | str]]] = []
        self.links: list[list] = []
        self.count = 0

    def column(self, title: str, width: int = 320) -> None:
        self.columns.append((title, width, []))

    def note(self, text: str) -> None:
        self.columns[-1][2].append(text)

    def add(self, kind: str, title: str | None = None, wires: dict | None = None, **widgets) -> Node:
        self.count += 1
        node = Node(self, self.count, kind, self.object_info[kind], widgets, title)
        for name, (origin, slot) in (wires or {}).items():
            spec = next(spec for spec in node.specs if spec.name == name)
            link = len(self.links) + 1
            self.links.append([link, origin.id, slot, node.id, None, spec.type])
            node.links[name] = link
            origin.outgoing.setdefault(slot, []).append(link)
        self.columns[-1][2].append(node)
        return node

    def save(self, path: Path) -> None:
        nodes, groups, x = [], [], 0
        for title, width, entries in self.columns:
            y = 0
            for entry in entries:
                if isinstance(entry, str):
                    self.count += 1
                    height = 60 + 22 * sum(1 + len(line) // (width // 8) for line in entry.splitlines())
                    nodes.append(_note(self.count, (x, y), (width, height), entry, len(nodes)))
                else:
                    height = entry.height()
                    nodes.append(entry.as_json((x, y), len(nodes), width))
                y += height + GAP
            groups.append(
                {
                    "id": len(groups) + 1,
                    "title": title,
                    "bounding": [x - 20, -80, width + 40, y + 60],
                    "color": "#3f789e",
                    "font_size": 24,
                    "flags": {},
                }
            )
            x += width + 80
        for link in self.links:
            target = next(node for node in nodes if node["id"] == link[3])
            link[4] = next(slot for slot, entry in enumerate(target["inputs"]) if entry["link"] == link[0])
        workflow = {
            "last_node_id": self.count,
            "last_link_id": len(self.links),
            "nodes": nodes,
            "links": self.links,
            "groups": groups,
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [100, 140]}},
            "version": 0.4,
        }
        path.write_text(json.dumps(workflow, indent=1) + "\n")


def _note(number: int, pos, size, text: str, order: int) -> dict:
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": list(pos),
        "size": list(size),
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#653",
    }


class Parts:
    """The stages that the workflows share."""

    def __init__(self, object_info: dict):
        self.flow = Workflow(object_info)

    def start(self, note: str, size: int = 512, frames: int = 0) -> None:
        flow = self.flow
        flow.column("1. Model and clip", 340)
        flow.note(note)
        self.checkpoint = flow.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
        self.video = flow.add("AdaFlowLoadVideo", file="clip.mp4", size=size, frame_count=frames)

    def start_with_demo(self, note: str) -> None:
        """The demo model and its clip in place of a checkpoint and a file."""
        flow = self.flow
        flow.column("1. Model and clip", 340)
        flow.note(note)
        self.checkpoint = flow.add("AdaFlowLoadDemoModel")
        self.demo_clip = flow.add("AdaFlowDemoClip")

    def demo_prompts(self) -> None:
        """As :meth:`prompts`, in the demo model's words; the clip says itself what it shows."""
        flow, clip = self.flow, self.checkpoint.out("CLIP")
        flow.column("2. Prompts", 340)
        wires = {"clip": clip, "text": self.demo_clip.out("caption")}
        self.source = flow.add("CLIPTextEncode", "What the clip shows", wires)
        self.positive = flow.add("CLIPTextEncode", "What it shall show", {"clip": clip}, text=DEMO_EDIT)
        self.negative = flow.add("CLIPTextEncode", "What it shall not show", {"clip": clip}, text="")
        wires = {"source": self.demo_clip.out("images"), "vae": self.checkpoint.out("VAE")}
        self.encoded = flow.add("AdaFlowEncodeVideo", None, wires)

    def prompts(self, source: bool = True) -> None:
        flow, clip = self.flow, self.checkpoint.out("CLIP")
        flow.column("2. Prompts", 340)
        if source:
            self.source = flow.add("CLIPTextEncode", "What the clip shows", {"clip": clip}, text=SOURCE)
        self.positive = flow.add("CLIPTextEncode", "What it shall show", {"clip": clip}, text=EDIT)
        self.negative = flow.add("CLIPTextEncode", "What it shall not show", {"clip": clip}, text=NEGATIVE)
        self.encoded = flow.add(
            "AdaFlowEncodeVideo", None, {"source": self.video.out("video"), "vae": self.checkpoint.out("VAE")}
        )

    def invert(self, steps: int) -> None:
        flow, model = self.flow, self.checkpoint.out("MODEL")
        flow.column("3. Invert, cut into clips", 340)
        wires = {"model": model, "source": self.source.out("CONDITIONING"), "latent": (self.encoded, 0)}
        self.inverted = flow.add("AdaFlowDDIMInvert", None, wires, steps=steps)
        wires = {"descriptors": self.inverted.out("descriptors")}
        self.keyframes = flow.add("AdaFlowKeyframeSelect", None, wires)
        self.slim = flow.add("AdaFlowSlimAttention", None, {"model": model})

    def joint(self, steps: int, positive, negative) -> None:
        flow = self.flow
        flow.column("4. Edit the keyframes together", 360)
        wires = {
            "model": (self.slim, 0),
            "positive": positive,
            "negative": negative,
            "trajectory": self.inverted.out("trajectory"),
            "plan": self.keyframes.out("plan"),
        }
        self.edit = flow.add("AdaFlowJointKeyframeEdit", None, wires, steps=steps)
        wires = {"samples": self.edit.out("keyframes"), "vae": self.checkpoint.out("VAE")}
        decoded = flow.add("VAEDecode", None, wires)
        flow.add("PreviewImage", "The edited keyframes", {"images": decoded.out("IMAGE")})

    def save_all(self) -> None:
        flow = self.flow
        flow.column("5. Edit every frame, save", 360)
        latent = flow.add("AdaFlowTokenPropagate", None, {"edit": self.edit.out("edit")})
        self.save((latent, 0))

    def save(self, frames) -> None:
        wires = {"frames": frames, "vae": self.checkpoint.out("VAE"), "source": self.video.out("video")}
        self.flow.add("AdaFlowSaveVideo", None, wires, filename_prefix="video/AdaFlow")


def demo_edit(object_info: dict) -> Workflow:
    parts = Parts(object_info)
    parts.start_with_demo(
        "## Try it: no checkpoint, no clip\n"
        "Run. A red car, drawn by AdaFlow Demo Clip, becomes blue, with the small model that comes with this pack; on "
        "a CPU it takes some minutes.\n\n"
        "Then change a word of what it shall show: *green*; or, with cfg at 2 in the joint edit and refine at 1 in the "
        "inversion, *in winter*, *at night*, *a watercolour of*: what changes the whole scene wants both. For your own "
        "clip put AdaFlow Load Video and Load Checkpoint in place of the two nodes here, as in the basic edit."
    )
    parts.demo_prompts()
    parts.invert(DEMO_STEPS)
    parts.joint(DEMO_STEPS, parts.positive.out("CONDITIONING"), parts.negative.out("CONDITIONING"))
    for node in (parts.keyframes, parts.edit):
        node.widgets |= demo_settings("colour")[node.kind]
    flow = parts.flow
    flow.column("5. Edit every frame, save", 360)
    latent = flow.add("AdaFlowTokenPropagate", None, {"edit": parts.edit.out("edit")})
    wires = {"frames": (latent, 0), "vae": parts.checkpoint.out("VAE"), "fps": parts.demo_clip.out("fps")}
    flow.add("AdaFlowSaveVideo", None, wires, filename_prefix="video/AdaFlow-demo")
    return flow


def basic_edit(object_info: dict) -> Workflow:
    parts = Parts(object_info)
    parts.start(
        "## Edit a clip\n"
        "1. Pick a Stable Diffusion 1.x, 2.x or SDXL checkpoint and a clip.\n"
        "2. Say what the clip shows, and what it shall show.\n"
        "3. Run. The keyframes appear first, then the whole clip.\n\n"
        "Shapes follow the source. For more freedom lower the two shares of the joint edit; for more keyframes raise "
        "the thresholds of the keyframe selection."
    )
    parts.prompts()
    parts.invert(50)
    parts.joint(50, parts.positive.out("CONDITIONING"), parts.negative.out("CONDITIONING"))
    parts.save_all()
    return parts.flow


def controlnet_edit(object_info: dict) -> Workflow:
    parts = Parts(object_info)
    parts.start(
        "## Edit a clip, with ControlNet\n"
        "As the basic edit; in addition every frame is held to its own edges. Pick a ControlNet that fits the "
        "checkpoint (here: canny). Any preprocessor that gives one image a frame will do; several can be chained.\n\n"
        "The frames of the clip are all in memory here, as images: keep it short, or the size small."
    )
    parts.prompts()
    flow = parts.flow
    flow.column("ControlNet: a hint a frame", 320)
    images = flow.add("GetVideoComponents", None, {"video": parts.video.out("video")})
    edges = flow.add("Canny", None, {"image": images.out("images")})
    net = flow.add("ControlNetLoader", control_net_name=CONTROLNET)
    wires = {
        "positive": parts.positive.out("CONDITIONING"),
        "negative": parts.negative.out("CONDITIONING"),
        "control_net": (net, 0),
        "image": (edges, 0),
    }
    apply = flow.add("ControlNetApplyAdvanced", None, wires, strength=0.6, end_percent=0.8)
    parts.invert(50)
    parts.joint(50, (apply, 0), (apply, 1))
    parts.save_all()
    return parts.flow


def keyframes_preview(object_info: dict) -> Workflow:
    parts = Parts(object_info)
    parts.start(
        "## Look at the edit before making it\n"
        "Inverts with few steps and edits one keyframe for each part of the clip, no more. Try prompts, guidance and "
        "shares here; the inversion is kept as long as clip, model and source prompt stay.\n\n"
        "Then open the basic edit with the same values and 50 steps."
    )
    parts.prompts()
    parts.invert(20)
    parts.keyframes.widgets["draw_mode"] = "fixed"
    parts.joint(20, parts.positive.out("CONDITIONING"), parts.negative.out("CONDITIONING"))
    return parts.flow


def slim_ksampler(object_info: dict) -> Workflow:
    parts = Parts(object_info)
    parts.start(
        "## Consistent frames from a plain KSampler\n"
        "No inversion: the frames are noised and sampled again, and attend to one another while they are. Good for a "
        "handful of frames. A lower denoise stays closer to the clip.\n\n"
        "The KV budget caps what each frame attends to, in frames' worth.",
        frames=16,
    )
    parts.prompts(source=False)
    flow = parts.flow
    flow.column("3. Sample the frames together", 340)
    slim = flow.add("AdaFlowSlimAttention", None, {"model": parts.checkpoint.out("MODEL")}, kv_budget=8)
    wires = {
        "model": (slim, 0),
        "positive": parts.positive.out("CONDITIONING"),
        "negative": parts.negative.out("CONDITIONING"),
        "latent_image": (parts.encoded, 0),
    }
    sampled = flow.add(
        "KSampler", None, wires, steps=20, cfg=7.0, denoise=0.55, sampler_name="dpmpp_2m", scheduler="karras"
    )
    flow.column("4. Save", 360)
    parts.save(sampled.out("LATENT"))
    return parts.flow


WORKFLOWS = {
    "adaflow-basic-edit": basic_edit,
    "adaflow-controlnet-edit": controlnet_edit,
    "adaflow-demo": demo_edit,
    "adaflow-keyframes-preview": keyframes_preview,
    "adaflow-slim-ksampler": slim_ksampler,
}


def main() -> None:
    object_info = json.loads(Path(sys.argv[1]).read_text())
    for name, make in WORKFLOWS.items():
        make(object_info).save(ROOT / "workflows" / f"{name}.json")


if __name__ == "__main__":
    main()
