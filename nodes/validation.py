"""What ComfyUI does not check of a prompt: that sockets are wired, that numbers are finite, that choices exist."""

import reprlib

from comfy_api.latest import io
from comfy_execution.validation import validate_node_input

from ..adaflow.errors import InputError, require, require_one_of

LONGEST_TEXT = 50_000


class CheckedNode(io.ComfyNode):
    """A node whose inputs are held against its schema, all of them, before anything runs."""

    @classmethod
    def validate_inputs(cls, input_types=None, **values) -> bool | str:
        """True, or the first input that the node does not take, in words.

        A wired input arrives as None, which a constant may be too. What tells them apart is ``input_types``, the
        output type of each input that is wired, which ComfyUI hands to a node that asks for it. It then leaves the
        types of links to the node, and the ranges of all inputs it passes. Numbers, texts and booleans have been
        converted by then; what cannot be, ComfyUI has refused.
        """
        schema, wired = cls.define_schema(), input_types or {}
        inputs = {entry.id: entry for entry in schema.inputs}
        try:
            for name, value in values.items():  # of unknown inputs ComfyUI passes on those that look like links
                require(name in inputs, schema.node_id, name[:80], "unknown", "one of " + (", ".join(inputs) or "none"))
                if name in wired:
                    _require_link(inputs[name], wired[name], schema.node_id)
                else:
                    _require_constant(inputs[name], value, schema.node_id)
            cls.check_constants({name: value for name, value in values.items() if name not in wired}, wired)
        except InputError as error:
            return str(error)
        return True

    @classmethod
    def check_constants(cls, constants: dict, wired: dict) -> None:
        """For nodes to override: raise :class:`InputError` for what the schema takes and the node does not.

        Args:
            constants: values by input, of those that are given and not wired.
            wired: output types by input, of those that are wired.
        """


def _require_link(entry: io.Input, received: str, where: str) -> None:
    kind = entry.get_io_type()
    require(validate_node_input(received, kind), where, entry.id, f"wired to {_a(received)}", _a(kind))


def _require_constant(entry: io.Input, value: object, where: str) -> None:
    """Numbers need both bounds in the schema. A combo that takes uploads lists some choices only: its node checks."""
    if not isinstance(entry, io.WidgetInput):
        raise InputError(where, entry.id, reprlib.repr(value), f"{_a(entry.get_io_type())}, wired from another node")
    if isinstance(entry, (io.Int.Input, io.Float.Input)):
        within = isinstance(value, (int, float)) and entry.min <= value <= entry.max
        kind, low, high = "a number", f"{entry.min:g}", f"{entry.max:g}"
        if isinstance(entry, io.Int.Input):
            kind, low, high = "a whole number", entry.min, entry.max
        require(within, where, entry.id, reprlib.repr(value), f"{kind} from {low} to {high}")
    elif isinstance(entry, io.Combo.Input) and not entry.upload:
        require_one_of(value, entry.options, where, entry.id)
    elif isinstance(entry, io.String.Input):
        require(len(value) <= LONGEST_TEXT, where, entry.id, f"of {len(value)} characters", f"at most {LONGEST_TEXT}")


def _a(kind: str) -> str:
    """``a LATENT or IMAGE``, from ComfyUI's ``LATENT,IMAGE``."""
    text = str(kind).replace(",", " or ")
    return f"{'an' if text[0] in 'AEIOU' else 'a'} {text}"
