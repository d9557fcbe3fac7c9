"""DDIM time grid and inversion (arXiv 2010.02502, section 4.3), and the change between sigma and alpha_bar.

Latents are *variance preserving* (VP, the network's scale) unless a name says ``ve``: ``x_ve = x_vp / mu`` with
``mu = sqrt(alpha_bar)``, and ``sigma = sqrt(1 - alpha_bar) / mu``, so ``mu = 1 / sqrt(1 + sigma**2)``.
"""

from bisect import bisect_left

import torch
from torch import Tensor


def ddim_timesteps(steps: int, train_steps: int = 1000) -> list[int]:
    """The ascending "leading" grid of offset 1: for 50 steps 1, 21, ..., 981.

    This is ComfyUI's ``ddim_uniform`` grid, so where ``steps`` does not divide ``train_steps`` it may hold one or more
    entries beyond ``steps``.

    Raises:
        ValueError: ``steps`` is not in 1 .. ``train_steps - 1``.
    """
    if not 1 <= steps < train_steps:
        raise ValueError(f"steps is {steps}; expected 1 to {train_steps - 1}")
    return list(range(1, train_steps, train_steps // steps))


def sigma_to_mu(sigma: Tensor | float) -> Tensor:
    """``sqrt(alpha_bar)`` at ``sigma``."""
    return (1.0 + torch.as_tensor(sigma) ** 2) ** -0.5


def inversion_step(x: Tensor, eps: Tensor, sigma_from: float, sigma_to: float) -> Tensor:
    """One deterministic step up in noise, VP in and out.

    The step down that an edit makes takes the noise predicted for the latent it comes from. With that of ``x`` this
    step is its inverse to first order; done again with the noise of its own result, round after round, it comes to be
    the exact one (fixed-point inversion: arXiv 2309.04907, also 2403.14602).

    Args:
        x: latent at ``sigma_from``, (frames, channels, height, width).
        eps: noise that the network predicts at the *target* time, for ``x`` or for the last round's result, the same
            shape.
        sigma_from: noise level of ``x``.
        sigma_to: noise level to go to.
    """
    x_ve = x / sigma_to_mu(sigma_from).item()
    return (x_ve + (sigma_to - sigma_from) * eps) * sigma_to_mu(sigma_to).item()


def bracket(sigmas: list[float], sigma: float) -> tuple[int, int, float]:
    """Neighbours ``lo, hi`` of ``sigma`` in an ascending grid and the weight of ``hi``.

    The weight is linear in sigma, along which a DDIM step moves the VE latent in a straight line. Below the grid the
    weight is 0; above it the last step is continued, so the weight exceeds 1.
    """
    hi = min(max(bisect_left(sigmas, sigma), 1), len(sigmas) - 1)
    lo = hi - 1
    weight = (sigma - sigmas[lo]) / (sigmas[hi] - sigmas[lo])
    for index, at in ((lo, 0.0), (hi, 1.0)):
        if abs(sigma - sigmas[index]) <= 1e-4 * sigmas[index]:  # the same grid point, rounded elsewhere
            weight = at
    return lo, hi, max(weight, 0.0)
