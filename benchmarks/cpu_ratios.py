"""What the method saves, as ratios that anyone can measure: on a CPU, with a small random UNet of SD's shape.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/cpu_ratios.py --out benchmarks/results/cpu-ratios.json

Under three minutes. Absolute times of a CPU say nothing about a GPU, and neither do these ratios exactly: a GPU is
better at attention than at gathers. They show what grows with what.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from harness import best_ms, comfyui_version, start_comfyui, write_result

FRAMES, CLIP, SIZE = 24, 6, (16, 24)


def median_seconds(function, times: int = 3) -> float:
    """Of some calls, after one that does not count."""
    function()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[times // 2]


def whole_method() -> dict[str, float]:
    """Seconds of a sampling step: every frame a keyframe, the method with and without injection, a plain forward."""
    from graph import Graph, each_frame, plain_euler, select

    graph = Graph("sd2", frames=FRAMES, size=SIZE, steps=1)
    sigma = graph.trajectory.sigmas[-1]

    def step(model):
        return lambda: plain_euler(model, graph.latent, [sigma, 0.0], graph.positive, graph.negative, 7.5)

    def edited(plan, shares, budget):
        return step(graph.patch(plan, graph.slim(budget), shares, chunk=8))

    clips = select(graph.descriptors, -1.0, -1.0, max_clip=CLIP, mode="fixed")
    nothing = (0.0, 0.0)
    return {
        "every frame a keyframe, full attention": median_seconds(
            edited(each_frame(graph.descriptors), nothing, FRAMES)
        ),
        "every frame a keyframe, budget 4": median_seconds(edited(each_frame(graph.descriptors), nothing, 4)),
        f"one keyframe in {CLIP}": median_seconds(edited(clips, nothing, 4)),
        f"one keyframe in {CLIP}, injecting": median_seconds(edited(clips, (1.0, 1.0), 4)),
        "no method: each frame by itself": median_seconds(step(graph.model)),
    }


def attention() -> dict[str, float]:
    """Milliseconds: a frame's queries over all keyframes, and over a budget of them with the gather counted."""
    from adaflow_pack.adaflow.attention import extended_attention, frame_attention

    tokens, width, heads, keyframes, budget = 512, 320, 5, 40, 10
    q = torch.randn(1, tokens, width)
    k, v = (torch.randn(keyframes, tokens, width) for _ in range(2))
    kept = torch.rand(1, keyframes * tokens).topk(budget * tokens).indices.sort().values
    return {
        f"full, {keyframes} keyframes": best_ms(lambda: extended_attention(q, k, v, heads)),
        f"slim, budget {budget}": best_ms(lambda: extended_attention(q, k, v, heads, kept)),
        "a frame by itself": best_ms(lambda: frame_attention(q, q, q, heads)),
    }


def propagation() -> dict[str, float]:
    """Milliseconds of one self-attention layer of a frame: computed, and gathered."""
    from adaflow_pack.adaflow.attention import frame_attention
    from adaflow_pack.adaflow.propagation import gather_outputs, output_rows

    tokens, width, heads, frames = 1024, 320, 5, 4
    x, weights = torch.randn(frames, tokens, width), [torch.randn(width, width) for _ in range(4)]
    slots, matches = torch.zeros(frames, dtype=torch.int64), torch.randint(tokens, (frames, tokens))

    def computed():
        q, k, v = (x @ weight for weight in weights[:3])
        return frame_attention(q, k, v, heads) @ weights[3]

    def gathered():
        return gather_outputs(x[:1], output_rows(slots, matches))

    return {"computed": best_ms(computed), "gathered": best_ms(gathered)}


def matching() -> dict[str, float]:
    """Milliseconds, and MiB of similarities held at once: all pairs in one matrix, and in tiles."""
    from adaflow_pack.adaflow.correspondence import nearest_tokens

    frames, tokens, channels, tile = 4, 1536, 320, 1 << 20
    tokens_of = torch.nn.functional.normalize(torch.randn(frames + 1, tokens, channels), dim=-1)
    query, key = tokens_of[1:], tokens_of[:1]
    return {
        "plain, ms": best_ms(lambda: (query @ key[0].T).max(dim=2)),
        "tiled, ms": best_ms(lambda: nearest_tokens(query, key, tile)),
        "plain, MiB": frames * tokens**2 * 4 / 2**20,
        "tiled, MiB": tile * 4 / 2**20,
    }


def ratios(times: dict[str, float], base: str) -> dict[str, float]:
    """Everything as a multiple of ``base``."""
    return {name: round(value / times[base], 3) for name, value in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", help="to be noted where this is no clone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="cpu-ratios-") as folder, torch.inference_mode():
        start_comfyui(Path(folder))
        results = {
            f"a sampling step of {FRAMES} frames": ratios(whole_method(), "no method: each frame by itself"),
            "attention of one query frame": ratios(attention(), "full, 40 keyframes"),
            "a self-attention layer of a frame that is no keyframe": ratios(propagation(), "computed"),
        }
        found = matching()
        results["matching"] = {
            f"tiled against plain, {what}": round(found[f"tiled, {unit}"] / found[f"plain, {unit}"], 3)
            for what, unit in (("time", "ms"), ("memory", "MiB"))
        }
        version = comfyui_version()
    for title, part in results.items():
        print(title)
        for name, ratio in part.items():
            print(f"  {name}: {ratio}")
    if options.out:
        write_result(options.out, {"comfyui": version, "ratios": results}, options.commit)


if __name__ == "__main__":
    main()
