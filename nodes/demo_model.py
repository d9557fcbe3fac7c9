"""AdaFlowLoadDemoModel: the small model that is shipped with the pack."""

from comfy_api.latest import io

from .patching.demo_model import load_demo_model
from .types import CATEGORY
from .validation import CheckedNode


class AdaFlowLoadDemoModel(CheckedNode):
    """Stands where a checkpoint loader would."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AdaFlowLoadDemoModel",
            display_name="AdaFlow Load Demo Model",
            category=CATEGORY,
            description="A small model with the blocks of Stable Diffusion 1.x, shipped with this pack: it edits a "
            "small clip within minutes, without a checkpoint or a GPU. It knows its own little world (cars, boats, "
            "balls, balloons and houses in six colours, three seasons, by day, at sunset and at night) and the styles "
            "photo, pencil sketch, watercolour, oil painting, comic and pixel art, which it also gives to real clips. "
            "Best at 192x128 to 320x192 pixels. For anything else put Load Checkpoint in its place: the outputs are "
            "the same.",
            inputs=[],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="A UNet of Stable Diffusion 1.x's shape, 35 M parameters."
                ),
                io.Clip.Output(display_name="CLIP", tooltip="Its text encoder, with SD 1.x's tokenizer."),
                io.Vae.Output(display_name="VAE", tooltip="Its autoencoder: 4 channels at an eighth of the size."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_model())
