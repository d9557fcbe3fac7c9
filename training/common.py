"""What the stages of training share: ComfyUI in this process, mixed precision, state that survives a break."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
PACK = "adaflow_pack"
WARM_UP = 3  # steps of a shape before its step is captured
SAVE_EVERY = 60.0  # seconds of training that a killed call may lose


def start_comfyui() -> None:
    """Import the ComfyUI at ``COMFYUI_PATH`` and mount the pack without its nodes, which need more packages."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    argv, sys.argv = sys.argv, sys.argv[:1]
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    sys.argv = argv
    for name, folder in (("", ROOT), (".nodes", ROOT / "nodes"), (".nodes.patching", ROOT / "nodes" / "patching")):
        module = ModuleType(PACK + name)
        module.__path__ = [str(folder)]
        sys.modules[PACK + name] = module


def pack_module(name: str) -> ModuleType:
    """A module of the pack by its dotted name inside it."""
    return importlib.import_module(f"{PACK}.{name}")


class Muon:
    """Momentum whose matrices are made orthogonal before each update; convolutions count as matrices of (out, rest).

    Keller Jordan et al., Muon (2024), with updates of AdamW's root mean square (arXiv 2502.16982, section 2.2), so that
    one learning rate serves both. Matrices of one shape are treated together.
    """

    def __init__(self, parameters: list[Tensor], rate: Tensor, momentum: float = 0.95, decay: float = 0.01):
        self.rate, self.momentum, self.decay = rate, momentum, decay
        self.momenta = {parameter: torch.zeros_like(parameter) for parameter in parameters}
        self.groups: dict[tuple, list[Tensor]] = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.flatten(1).shape), []).append(parameter)

    @torch.no_grad()
    def step(self) -> None:
        for shape, parameters in self.groups.items():
            momenta, slopes = [self.momenta[p] for p in parameters], [p.grad for p in parameters]
            torch._foreach_lerp_(momenta, slopes, 1 - self.momentum)
            ahead = torch._foreach_lerp(slopes, momenta, self.momentum)
            update = orthogonal(torch.stack([value.flatten(1) for value in ahead]).bfloat16()).float()
            update *= self.rate * 0.2 * max(shape) ** 0.5
            torch._foreach_mul_(parameters, 1 - self.rate * self.decay)
            torch._foreach_sub_(parameters, [u.view_as(p) for u, p in zip(update, parameters, strict=True)])


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with their singular values brought near 1 by Muon's Newton-Schulz iteration."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x if wide is matrices else x.mT


class Learner:
    """A module that computes in bfloat16, beside its float32 master weights, their average and optimisers.

    Muon learns the inner matrices, AdamW the rest. ``loss_of``: a scalar loss of tensors on the module's device. On a
    GPU a step is captured once for each shape of these and replayed: small networks are bound by launches otherwise.
    """

    def __init__(self, module: nn.Module, loss_of: Callable[..., Tensor], rate: float, average: float = 0.999):
        self.module, self.loss_of, self.rate, self.average = module, loss_of, rate, average
        self.work = [p for p in module.parameters() if p.requires_grad]
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.master = [p.detach().float().clone().requires_grad_() for p in self.work]
        self.mean = [p.detach().clone() for p in self.master]
        self.cuda = self.master[0].is_cuda
        device = self.master[0].device
        self.rate_now, self.keep = torch.zeros((), device=device), torch.zeros((), device=device)
        kind = {"fused": True, "capturable": True} if self.cuda else {}
        matrices = [m for name, m in zip(self.names, self.master, strict=True) if is_inner_matrix(name, m)]
        others = [m for name, m in zip(self.names, self.master, strict=True) if not is_inner_matrix(name, m)]
        self.muon = Muon(matrices, self.rate_now)
        self.adamw = torch.optim.AdamW(others, self.rate_now, betas=(0.9, 0.99), weight_decay=0.01, **kind)
        self.steps = self.samples = 0
        self.losses, self.counted = torch.zeros((), device=device), 0
        self.eager: dict[tuple, int] = {}
        self.graphs: dict[tuple, tuple] = {}

    def step(self, share: float, *inputs: Tensor) -> Tensor:
        """One update; ``share``: of the whole training that is over. Returns the loss, valid until the next step."""
        loss = self._replay_or_update(share, inputs)
        self.samples += len(inputs[0])
        self.losses += loss
        self.counted += 1
        return loss

    def mean_loss(self) -> float:
        """Of the steps since the last call, or since the start; there must have been one."""
        mean = (self.losses / self.counted).item()
        self.losses.zero_()
        self.counted = 0
        return mean

    def _replay_or_update(self, share: float, inputs: tuple[Tensor, ...]) -> Tensor:
        self.rate_now.fill_(self.rate * schedule(share, self.steps))
        self.keep.fill_(min(self.average, self.steps / (self.steps + 10)))
        self.steps += 1
        shape = tuple(value.shape for value in inputs)
        if shape not in self.graphs:
            self.eager[shape] = self.eager.get(shape, 0) + 1
            if not self.cuda or self.eager[shape] <= WARM_UP or not self._capture(shape, inputs):
                return self._update(*inputs)
        graph, places, loss = self.graphs[shape]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return loss

    def _capture(self, shape: tuple, inputs: tuple[Tensor, ...]) -> bool:
        """Whether a step could be captured; nothing is computed. What cannot be once is not tried again."""
        graph, places = torch.cuda.CUDAGraph(), [value.clone() for value in inputs]
        try:
            with torch.cuda.graph(graph):
                loss = self._update(*places)
        except RuntimeError as error:
            print("training goes on without captured steps:", error, flush=True)
            self.cuda = False
            return False
        self.graphs[shape] = graph, places, loss
        return True

    def _update(self, *inputs: Tensor) -> Tensor:
        loss = self.loss_of(*inputs)
        loss.backward()
        pairs = [(master, work) for master, work in zip(self.master, self.work, strict=True) if work.grad is not None]
        for master, _ in pairs:
            master.grad = torch.empty_like(master) if master.grad is None else master.grad
        torch._foreach_copy_([master.grad for master, _ in pairs], [work.grad for _, work in pairs])
        for work in self.work:
            work.grad = None
        nn.utils.clip_grad_norm_(self.master, 1.0)
        self.muon.step()
        self.adamw.step()
        with torch.no_grad():
            torch._foreach_copy_(self.work, self.master)
            torch._foreach_sub_(self.mean, self.master)
            torch._foreach_mul_(self.mean, self.keep)
            torch._foreach_add_(self.mean, self.master)
        return loss.detach()

    @torch.no_grad()
    def averaged(self) -> dict[str, Tensor]:
        """The module's state dict with the averaged float32 weights."""
        state = {name: value.detach().float() for name, value in self.module.state_dict().items()}
        return state | dict(zip(self.names, (value.clone() for value in self.mean), strict=True))

    def save(self, path: Path, seconds: float) -> None:
        """Write all that :meth:`load` needs to go on; ``seconds``: of training that led here."""
        tensors = {"steps": torch.tensor(self.steps), "samples": torch.tensor(self.samples)}
        tensors["seconds"] = torch.tensor(seconds, dtype=torch.float64)
        for name, master, mean in zip(self.names, self.master, self.mean, strict=True):
            tensors |= {f"master/{name}": master.detach(), f"mean/{name}": mean}
            tensors |= {f"{key}/{name}": value for key, value in self.adamw.state.get(master, {}).items()}
            if master in self.muon.momenta:
                tensors[f"momentum/{name}"] = self.muon.momenta[master]
        tensors |= {f"buffer/{name}": value for name, value in self.module.named_buffers()}
        save_whole(tensors, path)

    @torch.no_grad()
    def load(self, path: Path) -> float:
        """Go on from what :meth:`save` wrote; returns its seconds."""
        tensors = load_file(path, device=str(self.master[0].device))
        self.steps, self.samples = int(tensors["steps"]), int(tensors["samples"])
        for name, master, mean, work in zip(self.names, self.master, self.mean, self.work, strict=True):
            master.copy_(tensors[f"master/{name}"])
            mean.copy_(tensors[f"mean/{name}"])
            work.copy_(master)
            if f"step/{name}" in tensors:
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.adamw.state[master] = {key: tensors[f"{key}/{name}"] for key in keys}
            if master in self.muon.momenta:
                self.muon.momenta[master].copy_(tensors[f"momentum/{name}"])
        for name, value in self.module.named_buffers():
            value.copy_(tensors[f"buffer/{name}"])
        return float(tensors["seconds"])


def save_whole(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that is there whole or, after a break, as it was before."""
    partial = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
    partial.replace(path)


def is_inner_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is to learn it: not a vector, an embedding, or a layer that takes or gives a few channels."""
    return parameter.ndim > 1 and "embedding" not in name and min(parameter.flatten(1).shape) >= 16


def schedule(share: float, steps: int, warm_up: int = 200) -> float:
    """The learning rate's factor: a linear warm-up, then flat, then down to nothing over the last half."""
    return min(1.0, (steps + 1) / warm_up) * min(1.0, 2 * max(0.0, 1 - share) + 0.01)


class Clock:
    """The seconds a stage has used over all calls, and how many it may use in all and in this call.

    ``finished`` once :meth:`steps` ended because all seconds were used, not because the call was over. ``last``: the
    stage ends with this call, so that its learning rate comes down in the seconds that there are.
    """

    def __init__(self, total: float, call_ends: float, last: bool = False):
        self.total, self.call_ends, self.last = total, call_ends, last
        self.before, self.started, self.finished = 0.0, time.monotonic(), False

    @property
    def used(self) -> float:
        return self.before + time.monotonic() - self.started

    @property
    def share(self) -> float:
        return min(1.0, self.used / self.total)

    def steps(self, learner: Learner, state: Path) -> Iterator[int]:
        """Counts until the stage or the call is over, from where ``state`` was saved; saves there what was learnt.

        The seconds used are those of the saved weights: what a killed call did after its last save is done again.
        """
        if state.exists():
            self.before = learner.load(state)
        count, saved = 0, time.monotonic()
        self.started = saved  # what was set up before is not training
        if self.last:
            self.total = min(self.total, self.before + max(1.0, self.call_ends - saved))
            self.call_ends = float("inf")
        while self.used < self.total and time.monotonic() < self.call_ends:
            yield count
            count += 1
            if time.monotonic() - saved >= SAVE_EVERY:
                learner.save(state, self.used)
                saved = time.monotonic()
        seconds = self.used
        self.finished = seconds >= self.total
        learner.save(state, seconds)


class Log:
    """Lines of JSON, one per entry, kept from call to call."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, stage: str, seconds: float, **values) -> None:
        rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}
        entry = {"stage": stage, "seconds": round(seconds, 1)} | rounded
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")
        print(*(f"{key} {value}" for key, value in entry.items()), sep="  ", flush=True)

    def entries(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


@torch.no_grad()
def initialise(module: nn.Module, silent: tuple[str, ...], generator: torch.Generator) -> None:
    """Fan-in scaled normal weights, norms of one, biases of zero; zero where a name ends with one of ``silent``."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            fan_in = 1 if "embedding" in name else parameter[0].numel()
            factor = 0.02 if "embedding" in name else fan_in**-0.5
            value = torch.randn(parameter.shape, generator=generator) * factor
        else:
            value = torch.full(parameter.shape, float(name.endswith("weight") and parameter.ndim == 1))
        if any(name.endswith(end) for end in silent):
            value.zero_()
        parameter.copy_(value)
