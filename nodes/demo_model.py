"""AdaFlowLoadDemoModel: a small random model, to try the graph without a checkpoint."""

from comfy_api.latest import io

from .patching.demo_model import load_demo_model
from .types import CATEGORY


class AdaFlowLoadDemoModel(io.ComfyNode):
    """Stands where a checkpoint loader would."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AdaFlowLoadDemoModel",
            display_name="AdaFlow Load Demo Model",
            category=CATEGORY,
            description="A small random model with the blocks of Stable Diffusion 1.x, for trying the graph without a "
            "checkpoint and without a GPU. It has learnt nothing: what it paints means nothing. For a real edit put "
            "Load Checkpoint in its place: the outputs are the same.",
            inputs=[
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    tooltip="Of the random weights, 0 to 4294967295, default 0. The same seed makes the same model; "
                    "another seed paints other noise.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="A random UNet of Stable Diffusion 1.x's shape."),
                io.Clip.Output(display_name="CLIP", tooltip="A random text encoder with SD 1.x's tokenizer."),
                io.Vae.Output(display_name="VAE", tooltip="Keeps colours at an eighth of the resolution."),
            ],
        )

    @classmethod
    def execute(cls, seed: int) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_model(seed))
