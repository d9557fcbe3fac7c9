"""AdaFlow's nodes (V3 schema), one file per stage of the method."""

from comfy_api.latest import ComfyExtension, io

from .demo_clip import AdaFlowDemoClip
from .demo_model import AdaFlowLoadDemoModel
from .descriptors import AdaFlowExtractDescriptors
from .encode_video import AdaFlowEncodeVideo
from .invert import AdaFlowDDIMInvert
from .joint_edit import AdaFlowJointKeyframeEdit
from .keyframes import AdaFlowKeyframeSelect
from .load_video import AdaFlowLoadVideo
from .patch_model import AdaFlowPatchModel
from .propagate import AdaFlowTokenPropagate
from .save_video import AdaFlowSaveVideo
from .slim import AdaFlowSlimAttention

NODES: list[type[io.ComfyNode]] = [
    AdaFlowLoadVideo,
    AdaFlowEncodeVideo,
    AdaFlowDDIMInvert,
    AdaFlowExtractDescriptors,
    AdaFlowKeyframeSelect,
    AdaFlowSlimAttention,
    AdaFlowJointKeyframeEdit,
    AdaFlowTokenPropagate,
    AdaFlowPatchModel,
    AdaFlowSaveVideo,
    AdaFlowLoadDemoModel,
    AdaFlowDemoClip,
]


class AdaFlowExtension(ComfyExtension):
    """Lists the pack's nodes for ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
