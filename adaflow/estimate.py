"""What a run will need, known before it starts: memory of the accelerator, RAM and time.

``least`` is what surely must be there at one time, to refuse by; ``about`` is what to expect, to show. The numbers of
latents and of a forward's activations were measured (``tests/comfy/test_estimate.py``, ``benchmarks/results``).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from .descriptors import layer_sizes
from .errors import require

LATENT_VALUE = 4  # bytes: sampling is in float32
FORWARD_MAPS = 20  # of the largest layer that a frame's forward holds at its peak, skip connections included
FAST_FORWARD_MAPS = 12  # the same with fused norms and feed forwards in slices
EDIT_LATENTS, INVERSION_LATENTS = 9, 8  # copies of the clip's latent that sampling holds on the device
MASK_LATENTS = 2, 3  # more, at least and about, where a noise mask keeps parts of the source
GIVEN_LATENTS = 3, 4  # at least, about: what ComfyUI holds there while a sampler runs on others in RAM, and shows
RAM_LATENTS = 4  # copies of it in RAM: the node's input and result, and what is being written
PIXEL_COPIES = 3  # of a chunk of frames in RAM: from the VAE, as float32, as they are coded
CACHE_BYTES = 2 << 30  # of a plan's matches and selections, at the most


@dataclass(frozen=True)
class Amount:
    """Bytes: surely needed, and to be expected."""

    least: int
    about: int

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.least + other.least, self.about + other.about)


@dataclass(frozen=True)
class Needs:
    """Memory of a run: on the device that samples, and in RAM."""

    device: Amount
    ram: Amount


@dataclass(frozen=True)
class Attention:
    """One self-attention layer.

    Attributes:
        level: its resolution, 0 the latent's.
        channels: of its output.
        injected: whether the source's queries and keys are put in there.
        source_read: whether propagation of the source branch reads its output.
    """

    level: int
    channels: int
    injected: bool
    source_read: bool


@dataclass(frozen=True)
class UNetSizes:
    """What decides how much memory a UNet's activations take.

    Attributes:
        attentions: every self-attention.
        skips: (level, channels) of the encoder blocks' outputs.
        conv: (level, channels) of the feature that is injected.
        value_bytes: bytes of one activation.
        weight_bytes: bytes of all weights.
        forward_maps: as :data:`FORWARD_MAPS`.
    """

    attentions: tuple[Attention, ...]
    skips: tuple[tuple[int, int], ...]
    conv: tuple[int, int]
    value_bytes: int
    weight_bytes: int
    forward_maps: int = FORWARD_MAPS

    def _tokens(self, size: tuple[int, int]) -> list[int]:
        levels = 1 + max(level for level, _ in self.skips)
        return [height * width for height, width in layer_sizes(*size, levels)]

    def frame_bytes(self, size: tuple[int, int]) -> int:
        """Peak of one frame's forward in one branch, for a latent of (height, width)."""
        tokens = self._tokens(size)
        return self.forward_maps * self.value_bytes * max(tokens[level] * channels for level, channels in self.skips)

    def keyframe_bytes(self, size: tuple[int, int], branches: int, injecting: bool) -> Amount:
        """What one keyframe leaves on the device for the whole of a step: attention outputs, injected features.

        To be expected on top are its skip connections, while the chunks of the joint pass wait for one another.
        """
        tokens = self._tokens(size)
        values = branches * sum(tokens[layer.level] * layer.channels for layer in self.attentions)
        if injecting:
            for layer in self.attentions:
                values += tokens[layer.level] * layer.channels * (2 * layer.injected + layer.source_read)
            values += tokens[self.conv[0]] * self.conv[1]
        skips = sum(tokens[level] * channels for level, channels in self.skips)
        return Amount(values * self.value_bytes, (values + skips) * self.value_bytes)


def _latents(shape: tuple[int, int, int, int], least: int, about: int) -> Amount:
    frames, channels, height, width = shape
    one = frames * channels * height * width * LATENT_VALUE
    return Amount(least * one, about * one)


def inversion_needs(unet: UNetSizes, shape: tuple[int, int, int, int], chunk: int) -> Needs:
    """Memory of an inversion.

    Args:
        shape: of the clip's latent, (frames, channels, height, width).
        chunk: frames in one forward.
    """
    forward = Amount(0, unet.weight_bytes + min(chunk, shape[0]) * unet.frame_bytes(shape[2:]))
    return Needs(_latents(shape, 4, INVERSION_LATENTS) + forward, _latents(shape, 2, RAM_LATENTS))


def vae_needs(vae_bytes: int, width: int, height: int, chunk: int, latents: tuple[int, int, int, int] | None) -> Needs:
    """Memory of frames that go through a VAE, ``chunk`` at a time.

    Args:
        vae_bytes: that it takes on its device for one frame.
        latents: the shape of what is made and kept in RAM; None where frames go to a file.
    """
    pixels = width * height * 3 * 4
    kept = _latents(latents, 1, 1) if latents else Amount(0, 0)
    return Needs(Amount(0, vae_bytes), kept + Amount(pixels, PIXEL_COPIES * chunk * pixels))


def edit_needs(
    unet: UNetSizes,
    shape: tuple[int, int, int, int],
    keyframes: int,
    branches: int,
    chunk: int,
    injecting: bool,
    on_host: bool = False,
    latents_in_ram: bool = False,
    masked: bool = False,
) -> Needs:
    """Memory of an edit.

    Args:
        shape: of the latents that are sampled, (frames, channels, height, width).
        keyframes: of one step.
        branches: prompts that are evaluated: 1, or 2 with guidance.
        chunk: frames in one forward.
        injecting: whether any step injects features of the source.
        on_host: whether what the keyframes leave for the rest of a step waits in host memory.
        latents_in_ram: whether the sampler works there, on copies of what it is given on the device.
        masked: whether there is a noise mask.
    """
    size = shape[2:]
    keyframe = unet.keyframe_bytes(size, branches, injecting)
    forward = Amount(0, unet.weight_bytes + min(chunk, shape[0]) * branches * unet.frame_bytes(size))
    waiting = keyframes * keyframe.least
    # on the host are skip connections too: in their stead what a chunk that waits holds, and the keys and values
    kept = Amount(0 if on_host else waiting, keyframes * keyframe.about - (waiting if on_host else 0))
    cached = Amount(0, min(CACHE_BYTES, shape[0] * 4 * size[0] * size[1]))
    moved = Amount(waiting, keyframes * keyframe.about) if on_host else Amount(0, 0)
    ram = _latents(shape, 2, RAM_LATENTS) + cached + moved
    latents, given = _latents(shape, 3 + branches, EDIT_LATENTS), _latents(shape, *GIVEN_LATENTS)
    if masked:
        latents, given = latents + _latents(shape, *MASK_LATENTS), given + _latents(shape, 1, 1)
    if latents_in_ram:
        latents, ram = given, ram + latents
    return Needs(latents + kept + forward, ram)


def describe(needs: Needs, free: dict[str, int]) -> str:
    """One line for a user: what is needed and what is free.

    Args:
        free: bytes free of "GPU memory" and "RAM"; of "RAM" alone where the model runs on the CPU.
    """
    amounts = _by(needs, free)
    parts = (f"{amount.about / 1e9:.2f} GB of {kind} ({free[kind] / 1e9:.1f} free)" for kind, amount in amounts)
    return "needs about " + ", ".join(parts)


def _by(needs: Needs, free: dict[str, int]) -> list[tuple[str, Amount]]:
    if "GPU memory" in free:
        return [("GPU memory", needs.device), ("RAM", needs.ram)]
    return [("RAM", needs.device + needs.ram)]


def refuse_too_large(needs: Needs, free: dict[str, int], where: str, what: str, got: str, change: str) -> None:
    """Raise InputError where even the least that is needed is more than is free.

    Args:
        free: as for :func:`describe`.
        what, got: the input's name, and what it is, with numbers.
        change: what would make it fit.
    """
    for kind, amount in _by(needs, free):
        require(
            amount.least <= free[kind],
            where,
            what,
            f"{got}, which takes at least {amount.least / 1e9:.2f} GB of {kind}",
            f"at most the {free[kind] / 1e9:.2f} GB that are free: {change}",
        )


def plural(number: int, what: str) -> str:
    """The number and the noun, which takes an s in the plural."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def duration(seconds: float) -> str:
    """Seconds in the words of a person who waits."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class Pace:
    """Says how long a run will take: once a part of its first step has been measured, and again after a whole one.

    Args:
        end: number of the step at which the run is done; it may begin at any step.
        tell: gets the line.
        clock: seconds.
    """

    def __init__(self, end: int, tell: Callable[[str], None], clock: Callable[[], float] = time.perf_counter):
        self._end, self._tell, self._clock = end, tell, clock
        self._first: tuple[int, float] | None = None
        self._told, self._once = 0, 0.0

    def once(self, seconds: float) -> None:
        """Count out some seconds that other steps will not take."""
        self._once += seconds

    def begin_step(self, step: int) -> None:
        """Call it whenever the model is asked for a step, the first being 0."""
        if self._first is None:
            self._first = step, self._clock()
        elif self._told < 2 and step > self._first[0]:
            self._say((self._clock() - self._first[1] - self._once) / (step - self._first[0]))
            self._told = 2

    @property
    def asks(self) -> bool:
        """Whether :meth:`measured` still has something to tell."""
        return not self._told

    def measured(self, seconds: float) -> None:
        """Tell how long the first step will take, without :meth:`once`, as a part of it shows."""
        if not self._told:
            self._say(seconds)
            self._told = 1

    def _say(self, seconds: float) -> None:
        steps = self._end - self._first[0]
        self._tell(f"takes about {duration(seconds * steps)}: {steps} x {duration(seconds)}")
