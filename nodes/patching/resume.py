"""ComfyUI's samplers made to write down every step and to go on where a run was broken off, with the same bits.

A sampler whose step depends on the latent alone is started again from the latent of the broken step. One with a memory
of earlier steps is run again from its start, with the model's recorded predictions in place of the model.
"""

import functools
import logging
from collections.abc import Callable

import comfy.samplers
import torch
from torch import Tensor

from ...adaflow.runs import Run
from ...adaflow.storage import SafetensorsReader, save_tensor
from ...adaflow.trajectory import tensor_bytes

logger = logging.getLogger(__name__)
ONE_STEP = ("euler", "euler_cfg_pp")  # one call of the model a step, and nothing kept from one step to the next
UNBOUNDED = ("dpm_adaptive",)  # calls the model as often as its error estimate asks for
FILE_BYTES = 4096  # of a file beside its values: its header, its line in the manifest, what the disk rounds up to


@functools.cache
def calls_of(sampler_name: str, steps: int) -> int:
    """How often a sampler calls the model, counted on a latent of one value; 0 where that cannot be told."""
    calls = 0

    def model(x: Tensor, sigma: Tensor, **kwargs) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros_like(x)

    sampler, sigmas = comfy.samplers.sampler_object(sampler_name), torch.linspace(10.0, 0.0, steps + 1)
    options = {"extra_args": {"seed": 0, "model_options": {}}, "callback": None, "disable": True}
    try:
        sampler.sampler_function(model, torch.zeros(1, 1, 1, 1), sigmas, **options, **sampler.extra_options)
    except Exception as error:  # of another pack's sampler, that wants a true model
        logger.info("AdaFlow: the calls of %s cannot be counted (%r)", sampler_name, error)
        return 0
    return calls


def is_resumable(sampler_name: str, steps: int) -> bool:
    """Whether a sampler can go on: a CFG++ sampler with a memory looks into the model as it runs."""
    if sampler_name in ONE_STEP:
        return True
    return "cfg_pp" not in sampler_name and sampler_name not in UNBOUNDED and calls_of(sampler_name, steps) > 0


def checkpoint_bytes(sampler_name: str, shape, steps: int) -> int:
    """The most bytes on disk of a run over latents of ``shape``.

    Its result, and the latent of the last step or each prediction; the result alone where the sampler cannot go on.
    """
    kept = 1
    if sampler_name in ONE_STEP:
        kept = 2
    elif is_resumable(sampler_name, steps):
        kept = 1 + calls_of(sampler_name, steps)
    return kept * (tensor_bytes(shape, torch.float32) + FILE_BYTES)


def resumable(sampler_name: str, run: Run, course: Callable[[dict], dict]) -> comfy.samplers.KSAMPLER:
    """A sampler of ComfyUI that goes on with ``run``, notes every step in it and leaves its result there.

    Args:
        sampler_name: a deterministic one.
        course: from the sampler's ``extra_args`` to what a run that goes on has to do alike, to be noted too.
    """
    plain = comfy.samplers.sampler_object(sampler_name)

    def function(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        steps, done = len(sigmas) - 1, run.progress.get("step", 0)
        if done == steps:
            return _load(run, "latent").to(x)
        first = 0
        if sampler_name in ONE_STEP:
            first = done
            x = _load(run, "latent").to(x) if done else x
            model = _LatentLog(model, run, done, lambda: course(extra_args))
        elif is_resumable(sampler_name, steps):
            model = _PredictionLog(model, run, sigmas, lambda: course(extra_args), calls_of(sampler_name, steps))

        def shifted(state: dict) -> None:
            callback({**state, "i": state["i"] + first})

        x = plain.sampler_function(
            model, x, sigmas[first:], extra_args=extra_args, callback=callback and shifted, disable=disable, **options
        )
        _save(run, "latent", steps, x, run.names(), step=steps, finished=True)
        return x

    return comfy.samplers.KSAMPLER(function, plain.extra_options, plain.inpaint_options)


def finished_latent(run: Run) -> Tensor:
    """What the sampler gave in a run that is finished, as the model has it."""
    return _load(run, "latent")


def _save(run: Run, kind: str, number: int, values: Tensor, dropped: list[str], **progress) -> None:
    name = f"{kind}_{number:04d}.safetensors"
    run.commit({name: save_tensor(run.path(name), values, torch.float32)}, dropped, **{kind: number}, **progress)


def _load(run: Run, kind: str, number: int | None = None) -> Tensor:
    number = run.progress[kind] if number is None else number
    return SafetensorsReader(run.path(f"{kind}_{number:04d}.safetensors")).read("x", slice(None)).clone()


class _LatentLog:
    """Stands for the model: notes the latent with which each step begins."""

    def __init__(self, model, run: Run, step: int, course: Callable[[], dict]):
        self.inner_model, self._model = model.inner_model, model
        self._run, self._step, self._course = run, step, course

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs) -> Tensor:
        run = self._run
        if self._step > run.progress.get("step", 0):
            _save(run, "latent", self._step, x, run.names(), step=self._step, **self._course())
        self._step += 1
        return self._model(x, sigma, **kwargs)


class _PredictionLog:
    """Stands for the model: notes each prediction, and gives those that were noted in place of new ones.

    Args:
        most: predictions that are noted, so that the disk takes no more than was said; those after them are made again.
    """

    def __init__(self, model, run: Run, sigmas: Tensor, course: Callable[[], dict], most: int):
        self.inner_model, self._model = model.inner_model, model
        self._run, self._sigmas, self._course, self._most = run, sigmas, course, most
        self._call, self._recorded = 0, run.progress.get("prediction", 0)

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs) -> Tensor:
        self._call += 1
        if self._call <= self._recorded:
            return _load(self._run, "prediction", self._call).to(x)
        out = self._model(x, sigma, **kwargs)
        if self._call > self._most:
            return out
        reached = int((self._sigmas[:-1] >= sigma[0] * (1 - 1e-4)).sum())
        step = min(reached, len(self._sigmas) - 2)  # the last one is done with the result alone
        _save(self._run, "prediction", self._call, out, [], step=step, **self._course())
        return out
