"""AdaFlowSlimAttention: the KV budget of extended attention, for AdaFlow's nodes or for any sampler."""

from comfy_api.latest import io

from .patching.slim import SlimSettings, patch_slim
from .types import CATEGORY, Plan
from .validation import CheckedNode


class AdaFlowSlimAttention(CheckedNode):
    """Adaptive Attention Slimming as a patch."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AdaFlowSlimAttention",
            display_name="AdaFlow Slim Attention",
            category=CATEGORY,
            description="Lets all frames of a batch attend to one another, to the tokens that matter most. Before "
            "AdaFlow's edit nodes it sets their budget; before a KSampler it works by itself, with no inversion.",
            inputs=[
                io.Model.Input("model", tooltip="The model to patch; it is cloned, not changed."),
                io.Int.Input(
                    "kv_budget",
                    default=20,
                    min=1,
                    max=10000,
                    tooltip="Frames' worth of keys and values that a frame attends to, 1 to 10000, default 20. "
                    "Higher is more consistent, slower and takes more memory; 1 keeps a frame's own tokens only.",
                ),
                Plan.Input(
                    "plan",
                    optional=True,
                    tooltip="Rates tokens by the clip's descriptors; the sampled latent must then be the whole clip. "
                    "Without it a layer's own keys rate them.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The patched model.")],
        )

    @classmethod
    def execute(cls, model, kv_budget, plan=None) -> io.NodeOutput:
        return io.NodeOutput(patch_slim(model, SlimSettings(kv_budget, plan), "AdaFlowSlimAttention"))
