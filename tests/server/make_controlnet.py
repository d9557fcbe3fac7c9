"""Writes a random ControlNet of the demo model's size: make_controlnet.py COMFYUI TARGET, in a process of its own."""

import sys

sys.path.insert(0, sys.argv[1])
target, sys.argv[1:] = sys.argv[2], []

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)

from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.cldm.cldm  # noqa: E402
import comfy.ops  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

net = comfy.cldm.cldm.ControlNet(
    image_size=32,
    in_channels=4,
    hint_channels=3,
    model_channels=64,
    num_res_blocks=[2, 2, 2, 2],
    channel_mult=(1, 2, 4, 4),
    num_head_channels=64,
    use_spatial_transformer=True,
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_middle=1,
    context_dim=256,
    use_linear_in_transformer=True,
    legacy=False,
    operations=comfy.ops.disable_weight_init,
)
generator = torch.Generator().manual_seed(0)
weights = {}
for key, value in net.state_dict().items():
    if value.ndim > 1:
        scale = value[0].numel() ** -0.5
        weights[key] = (torch.randn(value.shape, generator=generator) * scale).half()
    else:
        weights[key] = torch.full(value.shape, float("norm" in key and key.endswith("weight")), dtype=torch.float16)
    if ".0.weight" in key and value.ndim == 1:  # group norms of residual blocks have no name of their own
        weights[key].fill_(1.0)
safetensors.torch.save_file(weights, target)
