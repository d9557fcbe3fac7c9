"""AdaFlow for ComfyUI: edits long videos from a text prompt with the user's own Stable Diffusion checkpoint.

Importing this package needs neither ComfyUI nor a GPU; ComfyUI calls :func:`comfy_entrypoint` when it loads the pack.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the ``ComfyExtension`` that lists the nodes of this pack."""
    from .nodes import AdaFlowExtension

    return AdaFlowExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
