"""What a result depends on, as a hash that is the same after a restart of ComfyUI."""

import functools
import hashlib
import logging
import types
import uuid
from enum import Enum

import comfy.model_management
import numpy as np
import torch
from comfy.controlnet import ControlBase
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...adaflow.descriptors import Descriptors
from ...adaflow.plan import EditPlan
from ...adaflow.trajectory import Trajectory

logger = logging.getLogger(__name__)
SAMPLED = 64  # values of each weight
HASHED_ROWS = 64
MOST_OBJECTS = 200_000
_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.Size, Enum, np.generic)
_CONTROL_STATE = {  # of a ControlNet while it samples, or where it runs
    "cond_hint", "control_input", "timestep_range", "model_sampling_current", "control_model_wrapped", "extra_concat",
    "device", "load_device",
}  # fmt: skip
_OWN_STATE = (types.ModuleType, torch.device, uuid.UUID)


def fingerprint(value: object) -> str:
    """Hash of plain data, tensors, CONDITIONING, MODELs and whatever patches they carry.

    Functions count by name, code and what they close over, objects by class, the code of its methods, and attributes.
    What a function calls counts by name only. An object that cannot be looked into makes the hash another one each
    time, so that what depends on it is never taken for the same.
    """
    hasher = _Hasher()
    try:
        hasher.add(value)
    except Exception as error:  # whatever another pack's objects do when looked at, it must not stop the run
        logger.info("AdaFlow: this run cannot be resumed: its inputs cannot be compared (%r)", error)
        return uuid.uuid4().hex
    return hasher.digest.hexdigest()[:16]


def model_fingerprint(model_patcher: ModelPatcher) -> str:
    """Hash that tells two checkpoints of one architecture apart, and all patches of a MODEL.

    Of each weight and each LoRA tensor some values are read, evenly spread. The device and torch's version count too.
    """
    device = comfy.model_management.get_torch_device_name(model_patcher.load_device)
    return fingerprint([model_patcher, torch.__version__, device])


def vae_fingerprint(vae) -> str:
    """The same of a VAE: its weights, sampled, and how and where it computes."""
    device = comfy.model_management.get_torch_device_name(getattr(vae, "device", comfy.model_management.vae_device()))
    model, dtype = getattr(vae, "first_stage_model", vae), getattr(vae, "vae_dtype", None)
    return fingerprint([model, dtype, torch.__version__, device])


def _constant(value: object) -> str:
    """A constant of compiled code as text, the same in every process; code by what it does and the names it uses."""
    if isinstance(value, types.CodeType):
        names = (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
        return f"code({value.co_code.hex()}, {names}, {_constant(value.co_consts)})"
    if isinstance(value, (tuple, frozenset)):
        parts = [_constant(part) for part in value]
        return f"{type(value).__name__}({', '.join(sorted(parts) if isinstance(value, frozenset) else parts)})"
    return repr(value)


class _Hasher:
    def __init__(self):
        self.digest = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._classes: set[type] = set()
        self._alive: list[object] = []  # so that no id is used twice

    def add(self, value: object, sampled: bool = False) -> None:
        """Take a value in; with ``sampled`` only some values of each tensor."""
        if isinstance(value, _PLAIN):
            self._text(type(value).__name__, repr(value))
            return
        if isinstance(value, _OWN_STATE):
            return
        if id(value) in self._seen:
            self._text("again", str(self._seen[id(value)]))
            return
        if len(self._seen) > MOST_OBJECTS:
            raise ValueError(f"more than {MOST_OBJECTS} objects")
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        if isinstance(value, Tensor):
            self._tensor(value, sampled)
        elif isinstance(value, np.ndarray):
            self._tensor(torch.from_numpy(np.ascontiguousarray(value)), sampled)
        elif isinstance(value, dict):
            self._items("dict", value.items(), sampled)
        elif isinstance(value, (list, tuple)):
            self._items(f"list {len(value)}", enumerate(value), sampled)
        elif isinstance(value, (set, frozenset)):
            self._items("set", enumerate(sorted(value, key=repr)), sampled)
        elif isinstance(value, type):
            self._text("class", value.__module__, value.__qualname__)
        else:
            self._object(value, sampled)

    def _object(self, value: object, sampled: bool) -> None:
        self._text("object", type(value).__module__, type(value).__qualname__)
        if isinstance(value, functools.partial):
            self._items("partial", enumerate((value.func, value.args, value.keywords)), sampled)
        elif isinstance(value, types.MethodType):
            self._items("method", enumerate((value.__func__, value.__self__)), sampled)
        elif isinstance(value, types.FunctionType):
            closed = [cell.cell_contents for cell in value.__closure__ or ()]
            self._text("function", value.__module__, value.__qualname__, _constant(value.__code__))
            self._items("constants", enumerate((closed, value.__defaults__, value.__kwdefaults__)), sampled)
        elif isinstance(value, (Trajectory, Descriptors, EditPlan)):
            self._items("ours", self._own(value).items(), sampled)
        elif isinstance(value, ModelPatcher):
            self._model(value)
        elif isinstance(value, nn.Module):
            self._methods(type(value))
            self._items("module", value.state_dict().items(), sampled=True)
        elif isinstance(value, ControlBase):
            self._methods(type(value))
            parts = {key: part for key, part in vars(value).items() if key not in _CONTROL_STATE}
            self._items("control", sorted(parts.items()), sampled)
        elif hasattr(value, "__dict__"):
            self._methods(type(value))
            self._items("attributes", sorted(vars(value).items()), sampled)
        elif isinstance(value, (types.BuiltinFunctionType, np.ufunc)):
            self._text("builtin", value.__name__)
        else:
            raise TypeError(f"a {type(value).__name__} cannot be compared from run to run")

    def _methods(self, kind: type) -> None:
        """The code of a class and of those it is derived from, once."""
        if kind in self._classes:
            return
        self._classes.add(kind)
        for base in kind.__mro__:
            if base.__module__.partition(".")[0] == "torch":  # which changes nn.Module once it has compiled something
                self._text("torch's", torch.__version__, base.__qualname__)
                continue
            for name, member in sorted(vars(base).items()):
                if isinstance(member, property):
                    member = member.fget
                elif isinstance(member, (staticmethod, classmethod)):
                    member = member.__func__
                if isinstance(member, types.FunctionType):
                    self._text("method", name, _constant(member.__code__))

    @staticmethod
    def _own(value) -> dict:
        if isinstance(value, Trajectory):
            return {"run": value.run.key, "noise_mask": value.noise_mask}
        if isinstance(value, Descriptors):
            return {"made_by": value.made_by}
        return {"descriptors": value.descriptors.made_by, "clips": value.clips, "draws": value.draws}

    def _model(self, patcher: ModelPatcher) -> None:
        """Weights as they are before patches, then the patches; not what depends on where the model is loaded."""
        weights = ((key, [part[0][0], *part[1:]]) for key, part in sorted(patcher.get_key_patches().items()))
        self._items("weights", weights, sampled=True)
        self._text("class", type(patcher.model).__qualname__, patcher.model.model_type.name)
        parts = ("object_patches", "model_options", "wrappers", "injections", "forced_hooks")
        self._items("patches", ((part, getattr(patcher, part, None)) for part in parts), sampled=True)

    def _items(self, kind: str, items, sampled: bool) -> None:
        self._text(kind)
        for key, part in items:
            self.add(key)
            self.add(part, sampled)
        self._text("end")

    def _text(self, *parts: str) -> None:
        self.digest.update("\0".join((*parts, "")).encode())

    def _tensor(self, values: Tensor, sampled: bool) -> None:
        self._text("tensor", str(values.dtype), str(tuple(values.shape)))
        if sampled:
            flat = values.detach().reshape(-1)
            flat = flat[:: max(1, flat.shape[0] // SAMPLED)][: 2 * SAMPLED]
            self.digest.update(flat.to("cpu", torch.float32).contiguous().numpy())
            return
        for start in range(0, values.shape[0] if values.ndim else 1, HASHED_ROWS):
            part = values[start : start + HASHED_ROWS] if values.ndim else values
            self.digest.update(part.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())
