"""AdaFlowTokenPropagate: the edit of every frame."""

from dataclasses import replace

from comfy_api.latest import io

from .common import RESUME, chunk_input, resume_input, sample_edit
from .types import CATEGORY, Edit
from .validation import CheckedNode


def propagation_inputs() -> list[io.Input]:
    """Interpolation and chunk, which two nodes take."""
    return [
        io.Boolean.Input(
            "interpolation",
            default=False,
            tooltip="Default off. On blends each frame between its own keyframe and the neighbouring clip's: hides the "
            "seams between clips, and smears where a cut is real.",
        ),
        chunk_input(),
    ]


def compile_input() -> io.Input:
    """Whether propagation is compiled, which two nodes take."""
    return io.Boolean.Input(
        "compile",
        default=False,
        optional=True,
        tooltip="Default off. On runs the propagation through torch.compile: the first step is slow, those after it "
        "may be faster, and the result is the same up to rounding. For long clips in full precision or on a CPU: in "
        "half precision on a GPU AdaFlow's own kernels are faster and stay in use, as the node then says. Needs a C "
        "compiler; without one it goes on as if off, with a message.",
    )


class AdaFlowTokenPropagate(CheckedNode):
    """Joint edit and propagation, step by step, over the whole clip."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AdaFlowTokenPropagate",
            display_name="AdaFlow Token Propagate",
            category=CATEGORY,
            description="Makes the edit of the whole clip. In each step the keyframes are edited together, and every "
            "other frame takes its attention outputs from its keyframe.",
            inputs=[
                Edit.Input("edit", tooltip="From AdaFlow Joint Keyframe Edit."),
                *propagation_inputs(),
                resume_input(),
                compile_input(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Every frame, edited: for AdaFlow Save Video.")],
        )

    @classmethod
    def execute(cls, edit, interpolation, chunk, resume=RESUME[0], compile=False) -> io.NodeOutput:
        where = "AdaFlowTokenPropagate"
        edit.check(where)
        settings = replace(edit.settings, interpolate=interpolation, chunk=chunk, compile=compile)
        frames = tuple(range(edit.trajectory.frames))
        return io.NodeOutput({"samples": sample_edit(edit, settings, frames, where, resume)})
