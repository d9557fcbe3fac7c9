"""The AdaFlow method (arXiv 2502.05433) as plain functions and objects of tensors; it never imports ComfyUI."""
