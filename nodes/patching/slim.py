"""Extended attention with slimming in any sampler, with no inversion: every frame of the batch is a keyframe."""

from dataclasses import dataclass

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from torch.nn.functional import normalize

from ...adaflow.attention import extended_attention
from ...adaflow.correspondence import matching_dtype
from ...adaflow.errors import require
from ...adaflow.plan import EditPlan
from ...adaflow.slimming import select_kv
from .families import unet_family
from .taps import PASS_KEY, UNetCall, UNetPass, run_unet, tapped

SLIM_KEY = "adaflow_slim"


@dataclass(frozen=True)
class SlimSettings:
    """KV budget, in frames' worth of keys and values, and the plan whose descriptors rate the tokens, if any."""

    budget: int
    plan: EditPlan | None = None

    def __deepcopy__(self, memo) -> "SlimSettings":
        """Itself: ComfyUI copies a MODEL's options deeply whenever it clones it, and a plan holds files and caches."""
        return self


class SlimPass(UNetPass):
    """Every frame attends to all frames of its conditioning, to ``budget`` frames' worth of their tokens.

    Without a plan a token's importance is its key's best cosine to the query frame's keys, in the layer itself.
    """

    def __init__(self, settings: SlimSettings, device: torch.device):
        self.settings = settings
        if settings.plan is not None:
            settings.plan.device = device

    def self_attention(self, call: UNetCall, layer, attn, x, context, value):
        context = x if context is None else context
        q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context if value is None else value)
        parts = zip(*(tensor.chunk(len(call.branches)) for tensor in (q, k, v)), strict=True)
        return attn.to_out(
            torch.cat([extended_attention(*part, attn.heads, self._kept(call, part[1])) for part in parts])
        )

    def _kept(self, call: UNetCall, keys: Tensor) -> Tensor | None:
        plan, frames = self.settings.plan, keys.shape[0]
        if frames <= self.settings.budget:
            return None
        if plan is None:
            return select_kv(normalize(keys.float(), dim=-1).to(matching_dtype(keys.device)), self.settings.budget)
        size = call.layer_size(keys.shape[1])
        require(
            frames == plan.frames,
            "AdaFlowSlimAttention",
            "plan",
            f"of {plan.frames} frames",
            f"{frames} frames, as the latent that is sampled has",
        )
        return plan.kept(tuple(range(frames)), self.settings.budget, size).to(keys.device)


def patch_slim(model_patcher, settings: SlimSettings, where: str):
    """A clone of MODEL with slimmed extended attention.

    AdaFlow's joint edit and patch nodes take the budget from it and run the method's own passes instead.
    """
    family = unet_family(model_patcher, where)
    require(settings.budget >= 1, where, "kv_budget", settings.budget, "at least 1 frame's worth")
    clone = model_patcher.clone()
    clone.model_options["transformer_options"][SLIM_KEY] = settings

    def diffusion_model(executor, x, *args, **kwargs):
        options = args[4]
        if PASS_KEY in options:
            return executor(x, *args, **kwargs)
        options = {**options, PASS_KEY: SlimPass(settings, x.device)}
        with tapped(executor.class_obj, family):
            return run_unet(executor, family, x, (*args[:4], options, *args[5:]), kwargs)

    clone.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, SLIM_KEY)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, SLIM_KEY, diffusion_model)
    return clone
