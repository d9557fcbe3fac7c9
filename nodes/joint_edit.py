"""AdaFlowJointKeyframeEdit: the keyframes edited together, to look at before the whole clip is made."""

import comfy.samplers
from comfy_api.latest import io

from .common import RESUME, preview_picture, resume_input, sample_edit
from .patching.edit import Edit
from .patching.evaluator import EditSettings
from .patching.patch import deterministic_samplers
from .patching.preview import latent_rgb
from .types import CATEGORY, Plan, Trajectory
from .types import Edit as EditType
from .validation import CheckedNode


def share_inputs() -> list[io.Input]:
    """The two injection shares, which two nodes take."""
    return [
        io.Float.Input(
            "feature_share",
            default=0.8,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Share of the steps, 0 to 1, default 0.8, in which a decoder feature of the source replaces the "
            "edit's. Higher keeps layout and shapes of the source; lower lets the prompt change them.",
        ),
        io.Float.Input(
            "attention_share",
            default=0.8,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Share of the steps, 0 to 1, default 0.8, in which the source's self-attention queries and keys "
            "replace the edit's. Higher keeps fine structure; lower gives the prompt more freedom.",
        ),
    ]


class AdaFlowJointKeyframeEdit(CheckedNode):
    """Joint edit of one keyframe for each clip."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AdaFlowJointKeyframeEdit",
            display_name="AdaFlow Joint Keyframe Edit",
            category=CATEGORY,
            description="Edits the keyframes together and shows them, in coarse colours without a VAE: a preview in "
            "seconds. With draw mode fixed these are the very keyframes of the finished clip; with resample they are "
            "the first step's.",
            inputs=[
                io.Model.Input("model", tooltip="The model to edit with: LoRA and patches stay in force. The KV budget "
                    "is that of AdaFlow Slim Attention when wired before, else 20 keyframes."),
                io.Conditioning.Input("positive", tooltip="The edit: what the clip shall show. ControlNet hints may be "
                    "one image a frame."),
                io.Conditioning.Input("negative", tooltip="What it shall not show. As published: ugly, blurry, low "
                    "res, unrealistic, unaesthetic."),
                Trajectory.Input("trajectory", tooltip="From AdaFlow DDIM Invert."),
                Plan.Input("plan", tooltip="From AdaFlow Keyframe Select."),
                io.Int.Input("steps", default=50, min=1, max=999, tooltip="Sampling steps, 1 to 999, default 50. At "
                    "most the steps of the inversion. Fewer are faster and coarser."),
                io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, tooltip="Classifier-free guidance, 0 "
                    "to 100, default 7.5. Higher follows the prompt more and the source less; 1 turns guidance off "
                    "and halves the work."),
                io.Combo.Input("sampler_name", options=deterministic_samplers(), default="ddim", tooltip="Sampler, "
                    "default ddim as published. Only deterministic ones: a sampler with noise of its own flickers."),
                io.Combo.Input("scheduler", options=comfy.samplers.SCHEDULER_NAMES, default="ddim_uniform",
                    tooltip="Noise schedule, default ddim_uniform: the grid of the inversion. Off that grid the source "
                    "is interpolated between two levels."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Handed to the sampler, 0 to 18446744073709551615, default 0. Deterministic samplers start "
                    "from the inverted clip and do not use it; keyframes are drawn by the plan's seed."),
                *share_inputs(),
                resume_input(),
            ],
            outputs=[
                io.Latent.Output(display_name="keyframes", tooltip="The edited keyframes: decode them for a look."),
                EditType.Output(display_name="edit", tooltip="For AdaFlow Token Propagate."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, trajectory, plan, steps, cfg, sampler_name, scheduler, seed,
        feature_share, attention_share, resume=RESUME[0],
    ) -> io.NodeOutput:  # fmt: skip
        where = "AdaFlowJointKeyframeEdit"
        settings = EditSettings(feature_share, attention_share)
        edit = Edit(
            model, positive, negative, trajectory, plan, settings, steps, cfg, sampler_name, scheduler, seed
        )  # fmt: skip
        edit.check(where)
        keyframes = sample_edit(edit, settings, plan.keyframes(0), where, resume)
        pictures = latent_rgb(model, keyframes).repeat_interleave(8, 1).repeat_interleave(8, 2)
        return io.NodeOutput({"samples": keyframes}, edit, ui=preview_picture(pictures, cls))
