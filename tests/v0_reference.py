"""LoFA_v0 once more, slowly and plainly, on published state dicts: what the real one must agree with.

Written from the description of the published architecture; it shares no code with lofa_core. One layer at a
time, all padding rows kept, nothing projected twice to save work.
"""

import math

import torch


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(state, name, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"]
        + state[f"{name}.bias"]
    )


def attention(state, name, x, context):
    width = x.shape[-1]
    if f"{name}.qkv.weight" in state:
        q, k, v = linear(state, f"{name}.qkv", x).split(width, -1)
    else:
        q, (k, v) = linear(state, f"{name}.q", x), linear(state, f"{name}.kv", context).split(width, -1)
    size = len(state[f"{name}.q_norm.weight"])
    outputs = []
    for start in range(0, width, size):
        part = slice(start, start + size)
        queries = layer_norm(state, f"{name}.q_norm", q[:, part], 1e-5)
        keys = layer_norm(state, f"{name}.k_norm", k[:, part], 1e-5)
        outputs.append((queries @ keys.T / math.sqrt(size)).softmax(-1) @ v[:, part])
    return linear(state, f"{name}.proj", torch.cat(outputs, -1))


def mlp(state, name, x):
    hidden = linear(state, f"{name}.fc1", x)
    hidden = 0.5 * hidden * (1.0 + torch.erf(hidden / math.sqrt(2.0)))
    return linear(state, f"{name}.fc2", hidden)


def tokens_of(state, W, depth, kind):
    normalised = W / (W.square().mean(0) + 1e-6).sqrt()
    kernel, patch = state["patch_embed.proj.weight"], state["patch_embed.proj.weight"].shape[-1]
    rows = []
    for i in range(0, W.shape[0], patch):
        for j in range(0, W.shape[1], patch):
            piece = normalised[i : i + patch, j : j + patch]
            token = (kernel[:, 0] * piece).sum((1, 2)) + state["patch_embed.proj.bias"]
            token = token / (token.square().mean() + torch.finfo(torch.float32).eps).sqrt()
            token = token * state["patch_embed.norm.weight"]
            token = token + state["pos.row"][0, i // patch, 0] + state["pos.col"][0, 0, j // patch]
            rows.append(token + state["depth_embed.weight"][depth] + state["type_embed.weight"][kind])
    return torch.stack([*state.get("cls_token", torch.empty(1, 0, 0))[0], *rows])


def stage(state, W, depth, kind, text, features=None):
    """Final normed tokens [T, d] of one layer."""
    x = tokens_of(state, W, depth, kind)
    words = linear(state, "text_proj", text)
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    for n in range(blocks):
        b, f = f"blocks.{n}", f"cross_attn_blocks.{n}"
        gamma = lambda name: state[f"{name}.gamma"]  # noqa: E731
        x = x + gamma(f"{b}.ls1") * attention(
            state, f"{b}.self_attn", layer_norm(state, f"{b}.norm1", x, 1e-6), None
        )
        x = x + gamma(f"{b}.ls2") * mlp(state, f"{b}.mlp_sa", layer_norm(state, f"{b}.norm2", x, 1e-6))
        x = x + gamma(f"{b}.ls3") * attention(
            state, f"{b}.cross_attn", layer_norm(state, f"{b}.norm3", x, 1e-6), words
        )
        x = x + gamma(f"{b}.ls4") * mlp(state, f"{b}.mlp_ca", layer_norm(state, f"{b}.norm4", x, 1e-6))
        if f"{f}.ls1.gamma" in state:
            x = x + gamma(f"{f}.ls1") * attention(state, f"{f}.cross_attn", x, features)
            x = x + gamma(f"{f}.ls2") * mlp(state, f"{f}.mlp", layer_norm(state, f"{f}.norm2", x, 1e-6))
    return layer_norm(state, "norm", x, 1e-5)


def factors(state, tokens, out, into):
    """(A [r, in], B [out, r], pooled token [d])."""
    pooled = (tokens if "cls_token" in state else tokens[1:]).mean(0)
    A = linear(state, "head_A", pooled).reshape(-1, into)
    return A, linear(state, "head_B", pooled).reshape(out, -1), pooled


def delta_and_logit(first, second, W, depth, kind, text):
    """(dW, Stage I's logit), both [out, in], of one layer for text states [S, width]."""
    features = stage(first, W, depth, kind, text)
    A, B, _ = factors(first, features, *W.shape)
    logit = (torch.nn.functional.softplus(B @ A) - 0.02) / 0.1
    A, B, pooled = factors(second, stage(second, W, depth, kind, text, features), *W.shape)
    alpha = torch.nn.functional.softplus(linear(second, "head_alpha", pooled))
    return alpha * (B @ A), logit
