"""The socket types that AdaFlow's nodes pass to one another."""

from comfy_api.latest import io

CATEGORY = "AdaFlow"

Trajectory = io.Custom("ADAFLOW_TRAJECTORY")
Descriptors = io.Custom("ADAFLOW_DESCRIPTORS")
Plan = io.Custom("ADAFLOW_PLAN")
Edit = io.Custom("ADAFLOW_EDIT")
