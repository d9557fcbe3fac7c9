"""AdaFlowPatchModel: the whole method as a patch of MODEL, for any sampler node."""

from comfy_api.latest import io

from .joint_edit import share_inputs
from .patching.evaluator import EditSettings
from .patching.patch import patch_edit
from .propagate import compile_input, propagation_inputs
from .types import CATEGORY, Plan, Trajectory
from .validation import CheckedNode


class AdaFlowPatchModel(CheckedNode):
    """Joint keyframe edit and propagation inside somebody else's sampler."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AdaFlowPatchModel",
            display_name="AdaFlow Patch Model",
            category=CATEGORY,
            description="The whole method as a patched MODEL: wire it to KSampler, SamplerCustomAdvanced or another "
            "pack's sampler, with the inverted clip's LATENT of all frames. Deterministic samplers only.",
            inputs=[
                io.Model.Input("model", tooltip="The model to edit with. The KV budget is that of AdaFlow Slim "
                    "Attention when wired before, else 20 keyframes."),
                Plan.Input("plan", tooltip="From AdaFlow Keyframe Select."),
                Trajectory.Input("trajectory", tooltip="From AdaFlow DDIM Invert."),
                *share_inputs(),
                *propagation_inputs(),
                io.Boolean.Input("start_from_trajectory", default=True, optional=True, tooltip="Default on: whatever "
                    "noise the sampler makes is replaced by the inverted clip at the sampler's first sigma. Off keeps "
                    "the sampler's own start: then give it the noisiest LATENT and turn its noise off."),
                compile_input(),
            ],
            outputs=[io.Model.Output(tooltip="The patched model.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, plan, trajectory, feature_share, attention_share, interpolation, chunk, start_from_trajectory=True,
        compile=False,
    ) -> io.NodeOutput:  # fmt: skip
        settings = EditSettings(
            feature_share,
            attention_share,
            interpolation,
            chunk=chunk,
            start_from_trajectory=start_from_trajectory,
            compile=compile,
        )
        return io.NodeOutput(patch_edit(model, plan, trajectory, settings, "AdaFlowPatchModel"))
