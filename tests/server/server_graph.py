"""The basic edit as a prompt, small enough for a test."""

from workflow_api import with_defaults


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}


def basic_prompt(object_info: dict, file: str, frames: int = 4, steps: int = 2) -> dict:
    """Load, encode, invert, select, edit, propagate, save; on the demo model, at 64x64, the rest at its defaults."""
    prompt = {
        "model": node("AdaFlowLoadDemoModel"),
        "load": node("AdaFlowLoadVideo", file=file, frame_count=frames, size=64),
        "encode": node("AdaFlowEncodeVideo", source=["load", 0], vae=["model", 2]),
        "source": node("CLIPTextEncode", clip=["model", 1], text="a yellow disc"),
        "positive": node("CLIPTextEncode", clip=["model", 1], text="a red disc"),
        "negative": node("CLIPTextEncode", clip=["model", 1], text="ugly"),
        "invert": node(
            "AdaFlowDDIMInvert", model=["model", 0], source=["source", 0], latent=["encode", 0], steps=steps
        ),
        "select": node("AdaFlowKeyframeSelect", descriptors=["invert", 1]),
        "joint": node(
            "AdaFlowJointKeyframeEdit",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            trajectory=["invert", 0],
            plan=["select", 0],
            steps=steps,
        ),
        "propagate": node("AdaFlowTokenPropagate", edit=["joint", 1]),
        "save": node(
            "AdaFlowSaveVideo",
            frames=["propagate", 0],
            vae=["model", 2],
            source=["load", 0],
            filename_prefix="test/basic",
        ),
    }
    return with_defaults(prompt, object_info)
