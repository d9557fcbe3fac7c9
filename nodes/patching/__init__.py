"""The only place that touches ComfyUI's internals: UNet hooks and the windowed evaluation of a sampling step."""
