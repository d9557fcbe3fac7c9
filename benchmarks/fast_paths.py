"""Compares every fast path with the plain one, or with a float64 oracle, on this machine and on random inputs.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/fast_paths.py --out FILE

In float32 with small UNets, and on a GPU in half precision at SD 2.1's full size as well. Fails if one is further off
than its limit.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from harness import comfyui_version, start_comfyui, write_result

SINGLE, HALF = 1e-5, 2e-2  # relative: single operations in half precision are held to less, see below
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Report:
    """Rows of what was compared.

    Attributes:
        save: called after each row.
    """

    def __init__(self):
        self.rows, self.save = [], lambda: None

    def add(self, path: str, precision: str, found: float, limit: float) -> None:
        self.rows.append({"path": path, "precision": precision, "relative difference": found, "limit": limit})
        print(f"{'ok ' if found <= limit else 'BAD'} {path}, {precision}: {found:.2e} (limit {limit:.0e})", flush=True)
        self.save()

    @property
    def good(self) -> bool:
        return all(row["relative difference"] <= row["limit"] for row in self.rows)


def operations(report: Report, dtype: torch.dtype, limit: float) -> None:
    """Attention, matching, selection and gathering on random tensors."""
    import oracles
    from adaflow_pack.adaflow import attention, correspondence, propagation, slimming

    precision = str(dtype).removeprefix("torch.")
    frames, tokens, heads, budget = 5, 301, 2, 2
    q, k, v = (torch.randn(frames, tokens, heads * 64, device=DEVICE).to(dtype) for _ in range(3))
    descriptors = torch.nn.functional.normalize(torch.randn(frames, tokens, 640, device=DEVICE), dim=-1)
    exact = descriptors.double()
    kept = slimming.select_kv(descriptors, budget)
    expected = oracles.slim_attention(q.double(), k.double(), v.double(), heads, exact, budget)
    found = attention.gathered_attention(q, k, v, heads, kept)
    report.add("slim attention: selection, gather, PyTorch's attention", precision,
               oracles.relative_error(found, expected), limit)  # fmt: skip
    if DEVICE == "cuda" and importlib.util.find_spec("triton"):
        from adaflow_pack.adaflow.attention_triton import slim_attention

        found = slim_attention(q, k, v, heads, kept)
        report.add(
            "slim attention: selection, Triton kernel", precision, oracles.relative_error(found, expected), limit
        )
    if DEVICE == "cuda" and dtype is not torch.float32 and attention._cudnn_works(q.device):
        with environment("ADAFLOW_ATTENTION", "cudnn"):
            found = attention.extended_attention(q, k, v, heads, kept)
        report.add("slim attention: selection, gather, cuDNN", precision, oracles.relative_error(found, expected),
                   limit)  # fmt: skip
    if dtype is torch.float32 or dtype is correspondence.matching_dtype(DEVICE):
        comparing(report, descriptors.to(dtype), exact, limit)
    if dtype is not torch.float32:
        return
    slots, matches = torch.randint(frames, (7,), device=DEVICE), torch.randint(tokens, (7, tokens), device=DEVICE)
    plain = torch.stack([v[slot][match] for slot, match in zip(slots, matches, strict=True)])
    found = propagation.gather_outputs(v, propagation.output_rows(slots, matches))
    report.add("gather of keyframe outputs", precision, oracles.relative_error(found, plain), 0.0)


def comparing(report: Report, descriptors: torch.Tensor, exact: torch.Tensor, limit: float) -> None:
    """Matching and the importance of tokens in the type that descriptors are compared in, against float64."""
    import oracles
    from adaflow_pack.adaflow import correspondence

    precision = str(descriptors.dtype).removeprefix("torch.")
    similarity, index = correspondence.nearest_tokens(descriptors[1:], descriptors[:1], tile_elements=5000)
    plain = torch.stack([query @ exact[0].T for query in exact[1:]])
    best = plain.max(2).values
    report.add("tiled matching, best similarity", precision, oracles.relative_error(similarity, best), limit)
    at_index = plain.gather(2, index[..., None]).squeeze(2)  # a tie may fall to another token of equal similarity
    report.add(
        "tiled matching, similarity of the token found", precision, oracles.relative_error(at_index, best), limit
    )
    alone = torch.empty(index.shape[1], dtype=torch.int16, device=DEVICE)
    correspondence.nearest_indices(descriptors[1], descriptors[0], alone)
    at_index = plain[0].gather(1, alone.long()[:, None])[:, 0]
    report.add("matching, index alone", precision, oracles.relative_error(at_index, best[0]), limit)
    of_first, of_second = correspondence.best_cosines(descriptors[:2], descriptors[2:4], 40_000)
    first, second = exact[:2], exact[2:4]
    for name, found, queries, rated in (("first", of_first, second, first), ("second", of_second, first, second)):
        expected = torch.stack([oracles.importance(torch.stack([query, *rated]), 0)[1:] for query in queries])
        report.add(f"importance of both sides of a product, the {name}", precision,
                   oracles.relative_error(found, expected), limit)  # fmt: skip


@contextmanager
def environment(name: str, value: str):
    """An environment variable set for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def steps(report: Report, graph, keyframes: int, precision: str, limit: float) -> None:
    """One sampling step, injecting, in every way that must not change it."""
    import oracles
    from graph import plain_euler, select

    frames = graph.latent.shape[0]
    plan = select(graph.descriptors, -1.0, -1.0, max_clip=-(-frames // keyframes), mode="fixed")

    def step(chunk: int = frames, **changes):
        model = graph.patch(plan, graph.slim(keyframes // 2), (1.0, 1.0), chunk=chunk, **changes)
        sigmas = [graph.trajectory.sigmas[-1], 0.0]
        return plain_euler(model, graph.latent, sigmas, graph.positive, graph.negative, 7.5)

    with environment("ADAFLOW_ATTENTION", "sdpa"):
        plain = step()
        for chunk in (keyframes // 2, 4):
            found = oracles.relative_error(step(chunk), plain)
            report.add(f"a step in chunks of {chunk} frames, keyframes in lockstep, against one batch", precision,
                       found, limit)  # fmt: skip
        report.add("a step compiled", precision, oracles.relative_error(step(8, compile=True), plain), limit)
    if DEVICE == "cuda" and precision != "float32":
        with environment("ADAFLOW_ATTENTION", "triton"):
            report.add("a step with the Triton kernel", precision, oracles.relative_error(step(), plain), limit)
        with environment("ADAFLOW_ATTENTION", "cudnn"):
            report.add("a step with cuDNN's attention", precision, oracles.relative_error(step(), plain), limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", help="to be noted where this is no clone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="fast-paths-") as folder, torch.inference_mode():
        start_comfyui(Path(folder))
        from graph import Graph
        from models import SD2_FULL, clip_latent, random_model

        about = {"comfyui": comfyui_version(), "complete": False, "rows": report.rows}
        if options.out:
            report.save = lambda: write_result(options.out, about, options.commit)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # whatever ComfyUI chose
        operations(report, torch.float32, SINGLE)
        with torch.backends.cudnn.flags(
            enabled=False, allow_tf32=False
        ):  # it takes another algorithm for another number of frames
            steps(report, Graph("sd2", frames=12, steps=1), 6, "float32", SINGLE)
        if DEVICE == "cuda":
            operations(report, torch.float16, 1e-3)
            operations(report, torch.bfloat16, 8e-3)
            model = random_model(SD2_FULL, "eps", 0, torch.float16, draw_on="cuda")
            model.model.diffusion_model.out[-1].weight.mul_(0.5)
            source = [[torch.randn(1, 77, 1024), {}]]
            graph = Graph("sd2", latent=clip_latent(48, (48, 84)), steps=1, model=model, source=source)
            graph.positive, graph.negative = [[source[0][0].flip(1), {}]], [[source[0][0].flip(2), {}]]
            steps(report, graph, 12, "float16", HALF)
        about["complete"] = True
        report.save()
    sys.exit(0 if report.good else 1)


if __name__ == "__main__":
    main()
