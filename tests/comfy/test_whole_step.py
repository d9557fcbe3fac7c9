"""One whole step of the method against a float64 evaluation written out plainly.

The oracle walks the UNet's blocks itself and knows nothing of hooks, windows, branches in a batch or early stops: it
evaluates every branch of every frame from end to end.
"""

import math

import oracles
import pytest
import torch
from adaflow_pack.nodes.patching import families
from adaflow_pack.nodes.patching.demo_model import DemoConfig
from graph import Graph, plain_euler, select
from models import SHAPES, conditioning

INJECTED = {12: (4, range(4, 12)), 9: (3, range(3, 9))}


def transformer(module, x, context, attend):
    """A SpatialTransformer with ``attend(place, attn1, tokens)`` for its self-attentions."""
    frames, _, height, width = x.shape
    tokens = module.norm(x)
    if module.use_linear:
        tokens = module.proj_in(tokens.flatten(2).transpose(1, 2))
    else:
        tokens = module.proj_in(tokens).flatten(2).transpose(1, 2)
    for depth, block in enumerate(module.transformer_blocks):
        tokens = tokens + attend(depth, block.attn1, block.norm1(tokens))
        rows = []
        for row, y in enumerate(block.norm2(tokens)):
            cross = block.attn2
            q, k, v = cross.to_q(y), cross.to_k(context[row]), cross.to_v(context[row])
            rows.append(cross.to_out(oracles.attention(q, k, v, cross.heads)))
        tokens = tokens + torch.stack(rows)
        tokens = tokens + block.ff(block.norm3(tokens))
    if module.use_linear:
        tokens = module.proj_out(tokens)
    maps = tokens.transpose(1, 2).reshape(frames, -1, height, width)
    return x + (maps if module.use_linear else module.proj_out(maps))


def unet_forward(unet, x, t, context, attend, inject=None, y=None):
    """eps of a batch of frames. ``attend(place, attn1, tokens)``; ``inject(feature)`` at the injected ResBlock."""
    half = unet.model_channels // 2
    angles = t * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    emb = unet.time_embed(torch.cat([angles.cos(), angles.sin()])[None].repeat(len(x), 1).to(x.dtype))
    if y is not None:
        emb = emb + unet.label_emb(y)

    def run(section, number, block, h, target=None):
        for part in block:
            name = type(part).__name__
            if name == "ResBlock":
                feature = part.in_layers(h) + part.emb_layers(emb)[:, :, None, None]
                feature = part.out_layers(feature)
                if inject is not None and (section, number) == ("output", INJECTED[len(unet.output_blocks)][0]):
                    feature = inject(feature)
                h = part.skip_connection(h) + feature
            elif name == "SpatialTransformer":
                h = transformer(part, h, context, lambda d, attn, n: attend((section, number, d), attn, n))
            elif name == "Upsample":
                h = torch.nn.functional.interpolate(h, target, mode="nearest")
                h = part.conv(h)
            else:
                h = part(h)
        return h

    h, skips = x, []
    for number, block in enumerate(unet.input_blocks):
        h = run("input", number, block, h)
        skips.append(h)
    h = run("middle", 0, unet.middle_block, h)
    for number, block in enumerate(unet.output_blocks):
        h = torch.cat([h, skips.pop()], 1)
        h = run("output", number, block, h, skips[-1].shape[2:] if skips else None)
    return unet.out(h)


def resized(descriptors, latent_size, tokens):
    """Normalised descriptors (N, tokens, C) of the layer that has so many tokens."""
    height, width = latent_size
    while height * width != tokens:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    maps = torch.nn.functional.interpolate(descriptors, (height, width), mode="bilinear", align_corners=False)
    return torch.nn.functional.normalize(maps.flatten(2).transpose(1, 2), dim=-1)


def oracle_step(unet, x, x_source, t, contexts, descriptors, clips, keyframes, budget, conv, attention, ys, blend):
    """eps of cond and uncond of every frame, the whole method with nothing saved. All float64, VP latents."""
    _, blocks = INJECTED[len(unet.output_blocks)]
    size, n = x.shape[2:], len(x)
    q_source, k_source, conv_source, joint = {}, {}, {}, {}

    def own(place, attn, tokens):
        q, k, v = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        q_source[place], k_source[place] = q, k
        return attn.to_out(torch.stack([oracles.attention(*row, attn.heads) for row in zip(q, k, v, strict=True)]))

    def batch(value, rows):
        return None if value is None else value.expand(rows, -1) if value.ndim == 2 else value.expand(rows, -1, -1)

    def propagated(branch, slots_of):
        def attend(place, attn, tokens):
            maps = resized(descriptors, size, tokens.shape[1])
            rows = []
            for f in range(n):
                out = 0.0
                for slot, weight in slots_of(f):
                    match = oracles.nearest(maps[f], maps[keyframes[slot]])
                    out = out + weight * joint[branch, place][slot][match]
                rows.append(out)
            return torch.stack(rows)

        return attend

    def slots_of(f):
        clip = max(c for c, start in enumerate(clips) if start <= f)
        p = keyframes[clip]
        other = clip + (1 if f > p else -1)
        if not blend or f == p or not 0 <= other < len(clips):
            return [(clip, 1.0)]
        d_p, d_q = abs(f - p), abs(f - keyframes[other])
        w = 1 / (1 + math.exp(-d_q / (d_p + d_q)))
        return [(clip, w), (other, 1 - w)]

    def source_joint(place, attn, tokens):
        joint["source", place] = own(place, attn, tokens)
        return joint["source", place]

    keep = list(keyframes)
    unet_forward(
        unet, x_source[keep], t, batch(contexts["source"], len(keep)), source_joint,
        lambda feature: conv_source.setdefault("joint", feature), batch(ys["source"], len(keep)),
    )  # fmt: skip
    if conv:
        unet_forward(
            unet, x_source, t, batch(contexts["source"], n), propagated("source", slots_of),
            lambda feature: conv_source.setdefault("all", feature), batch(ys["source"], n),
        )  # fmt: skip
    out = {}
    for branch in ("cond", "uncond"):

        def extended(place, attn, tokens, branch=branch):
            q, k, v = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
            if attention and place[0] == "output" and place[1] in blocks:
                q, k = q_source[place], k_source[place]
            maps = resized(descriptors, size, tokens.shape[1])[keep]
            joint[branch, place] = attn.to_out(oracles.slim_attention(q, k, v, attn.heads, maps, budget))
            return joint[branch, place]

        def replaced(where):
            return (lambda feature: conv_source[where]) if conv else None

        unet_forward(
            unet, x[keep], t, batch(contexts[branch], len(keep)), extended, replaced("joint"),
            batch(ys[branch], len(keep)),
        )  # fmt: skip
        out[branch] = unet_forward(
            unet, x, t, batch(contexts[branch], n), propagated(branch, slots_of), replaced("all"), batch(ys[branch], n)
        )
        # the propagated forward of a keyframe differs from its joint one only by the injected feature
        kept = unet_forward(
            unet, x[keep], t, batch(contexts[branch], len(keep)), extended, replaced("joint"),
            batch(ys[branch], len(keep)),
        )  # fmt: skip
        out[branch][keep] = kept
    return out


INJECTIONS = pytest.mark.parametrize(
    ("conv", "attention", "blend", "budget"),
    [(True, True, False, 2), (True, False, True, 1), (False, True, False, 20), (False, False, True, 2)],
)


@pytest.mark.parametrize("shape", SHAPES)
@INJECTIONS
def test_one_step_equals_the_oracle(shape, conv, attention, blend, budget):
    check_one_step(shape, conv, attention, blend, budget)


@INJECTIONS
def test_the_feature_may_come_after_the_first_queries_and_keys(monkeypatch, conv, attention, blend, budget):
    """The demo model's block numbers: layers whose queries and keys are injected lie before the injected ResBlock."""
    row = families.FAMILIES[DemoConfig]
    assert row.conv_block > row.attention_blocks[0]
    monkeypatch.setitem(families.FAMILIES, 12, row)
    monkeypatch.setitem(INJECTED, 12, (row.conv_block, row.attention_blocks))
    check_one_step("sd1", conv, attention, blend, budget)


def check_one_step(shape, conv, attention, blend, budget):
    graph = Graph(shape, frames=7, size=(6, 9), steps=2)
    keyframes = "1,3,6" if blend else "2,4,6"
    plan = select(graph.descriptors, -1.0, -1.0, max_clip=3, mode="schedule", schedule=keyframes)
    cfg = 4.0
    model = graph.patch(plan, graph.slim(budget), (float(conv), float(attention)), blend, chunk=2)
    sigma = graph.trajectory.sigmas[-1]
    out = plain_euler(model, graph.latent, [sigma, 0.0], graph.positive, graph.negative, cfg)

    unet = graph.model.model.diffusion_model.double()
    try:
        contexts = {"source": graph.source, "cond": graph.positive, "uncond": graph.negative}
        ys = dict.fromkeys(contexts)
        if shape == "sdxl":
            encode = graph.model.model.encode_adm
            ys = {k: encode(width=72, height=48, **c[0][1]).double() for k, c in contexts.items()}
        contexts = {k: c[0][0].double() for k, c in contexts.items()}
        scale = graph.model.model.latent_format.scale_factor
        mu = (1 + sigma**2) ** -0.5
        x = graph.trajectory.level(graph.steps).double()
        t = graph.model.model.model_sampling.timestep(torch.tensor(sigma)).double()
        predictions = oracle_step(
            unet, x, x, t, contexts, graph.descriptors.tokens(list(range(7))).double().transpose(1, 2).reshape(
                7, -1, 6, 9
            ), plan.clips.starts, plan.keyframes(0), budget, conv, attention, ys, blend,
        )  # fmt: skip
    finally:
        unet.float()
    clean = {}
    for branch, output in predictions.items():
        if SHAPES[shape][1] == "v":
            clean[branch] = mu * x - (1 - mu**2) ** 0.5 * output
        else:
            clean[branch] = (x - (1 - mu**2) ** 0.5 * output) / mu
    expected = clean["uncond"] + cfg * (clean["cond"] - clean["uncond"])
    assert oracles.relative_error(out * scale, expected) < 1e-5


def test_the_oracle_can_fail():
    """A wrong injected block, a dropped source branch or a wrong match each moves the result by far more."""
    graph = Graph("sd1", frames=4, size=(6, 9), steps=2, source=conditioning("sd1", 1))
    plan = select(graph.descriptors, -1.0, -1.0, max_clip=2, mode="schedule", schedule="0,2")

    def run(shares, blend=False, **changes):
        model = graph.patch(plan, graph.slim(2), shares, blend)
        return plain_euler(model, graph.latent, [graph.trajectory.sigmas[-1], 0.0], graph.positive, graph.negative, 4.0)

    base = run((1.0, 1.0))
    for other in (run((0.0, 1.0)), run((1.0, 0.0)), run((1.0, 1.0), blend=True)):
        assert oracles.relative_error(other, base) > 1e-3
