"""The graph in Python: each function runs one node on small models, as ComfyUI would."""

import torch
from adaflow_pack.nodes.invert import AdaFlowDDIMInvert
from adaflow_pack.nodes.joint_edit import AdaFlowJointKeyframeEdit
from adaflow_pack.nodes.keyframes import AdaFlowKeyframeSelect
from adaflow_pack.nodes.patch_model import AdaFlowPatchModel
from adaflow_pack.nodes.propagate import AdaFlowTokenPropagate
from adaflow_pack.nodes.slim import AdaFlowSlimAttention
from models import clip_latent, conditioning, small_model

AFRESH = "start afresh"  # a test that runs a thing twice wants it done twice


def select(descriptors, mean=0.75, window=0.6, max_clip=400, mode="resample", seed=0, schedule=""):
    return AdaFlowKeyframeSelect.execute(descriptors, mean, window, max_clip, mode, seed, schedule).args[0]


def each_frame(descriptors):
    """A plan in which every frame is its own keyframe."""
    return select(descriptors, mean=-1.0, window=-1.0, max_clip=1)


def plain_euler(model, latent, sigmas, positive, negative, cfg, sampler="euler", mask=None):
    """ComfyUI's own sampling from ``latent`` with no noise and no AdaFlow."""
    import comfy.sample
    import comfy.samplers

    return comfy.sample.sample_custom(
        model,
        torch.zeros_like(latent),
        cfg,
        comfy.samplers.sampler_object(sampler),
        torch.as_tensor(sigmas),
        positive,
        negative,
        latent,
        noise_mask=mask,
        disable_pbar=True,
        seed=0,
    )


class Graph:
    """A clip inverted by a small model, and the nodes that edit it."""

    def __init__(self, shape="sd1", frames=6, size=(8, 12), steps=4, latent=None, model=None, source=None, seed=0):
        self.shape, self.steps = shape, steps
        self.model = model or small_model(shape, seed)
        self.latent = clip_latent(frames, size) if latent is None else latent
        self.source = source or conditioning(shape, 1)
        self.positive, self.negative = conditioning(shape, 2), conditioning(shape, 3)
        inverted = AdaFlowDDIMInvert.execute(
            self.model, self.source, {"samples": self.latent}, steps, "float32", resume=AFRESH
        )
        self.trajectory, self.descriptors, noisiest = inverted.args
        self.noisiest = noisiest["samples"]

    def joint(self, plan=None, model=None, steps=None, cfg=3.0, sampler="ddim", scheduler="ddim_uniform", **changes):
        """(edited keyframes, ADAFLOW_EDIT)."""
        settings = {"positive": self.positive, "negative": self.negative, "trajectory": self.trajectory, "shares": None}
        settings["resume"] = AFRESH
        settings |= changes
        conv, attention = settings["shares"] or (0.8, 0.8)
        keyframes, edit = AdaFlowJointKeyframeEdit.execute(
            model or self.model,
            settings["positive"],
            settings["negative"],
            settings["trajectory"],
            plan or select(self.descriptors),
            steps or self.steps,
            cfg,
            sampler,
            scheduler,
            0,
            conv,
            attention,
            settings["resume"],
        ).args
        return keyframes["samples"], edit

    def edit(self, plan=None, interpolation=False, chunk=0, resume=AFRESH, compile=False, **changes):
        """Every frame, edited."""
        _, edit = self.joint(plan, **changes)
        return AdaFlowTokenPropagate.execute(edit, interpolation, chunk, resume, compile).args[0]["samples"]

    def slim(self, budget, plan=None, model=None):
        return AdaFlowSlimAttention.execute(model or self.model, budget, plan).args[0]

    def patch(self, plan=None, model=None, shares=(0.8, 0.8), interpolation=False, chunk=0, start=True, compile=False):
        plan = plan or select(self.descriptors)
        return AdaFlowPatchModel.execute(
            model or self.model, plan, self.trajectory, *shares, interpolation, chunk, start, compile
        ).args[0]

    def sigmas(self):
        return torch.tensor([*reversed(self.trajectory.sigmas[1:]), 0.0])
