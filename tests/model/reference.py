"""The architecture written a second time, straight from its equations, for the tests to compare with.

Everything is float64, one token at a time where that is simpler, over the checkpoint's own tensors; nothing of
`stepflash.model` but the configuration values is used.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def norm(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (1.0 + weight)


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def swiglu(x: Array, gate: Array, up: Array, down: Array, limit: float) -> Array:
    g, u = gate @ x, up @ x
    g = g * sigmoid(g)
    if limit:
        g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    return down @ (g * u)


def turn(x: Array, position: int, theta: float, width: int, scaling: dict[str, Any] | None) -> Array:
    """Rotate one head vector."""
    out = x.copy()
    for j in range(width // 2):
        f = theta ** (-2 * j / width)
        if scaling:
            wavelength = 2 * math.pi / f
            original = scaling["original_max_position_embeddings"]
            if wavelength > original / scaling["low_freq_factor"]:
                f /= scaling["factor"]
            elif wavelength > original / scaling["high_freq_factor"]:
                s = (original / wavelength - scaling["low_freq_factor"]) / (
                    scaling["high_freq_factor"] - scaling["low_freq_factor"]
                )
                f = (1 - s) * f / scaling["factor"] + s * f
        c, s_ = math.cos(position * f), math.sin(position * f)
        a, b = x[j], x[j + width // 2]
        out[j], out[j + width // 2] = a * c - b * s_, b * c + a * s_
    return out


class Reference:
    """`raw` is a config.json, `tensors` the checkpoint."""

    def __init__(self, raw: dict[str, Any], tensors: dict[str, Any]) -> None:
        self.raw = raw
        self.t = {name: np.asarray(tensor, dtype=np.float64) for name, tensor in tensors.items()}
        enum = raw["moe_layers_enum"]
        self.moe_layers = {int(i) for i in (enum.split(",") if isinstance(enum, str) else enum)}

    def attention(self, i: int, x: Array) -> Array:
        raw, p = self.raw, f"model.layers.{i}.self_attn."
        full = raw["layer_types"][i] == "full_attention"
        spec = raw if full else raw["attention_other_setting"]
        heads, groups, dim = spec["num_attention_heads"], spec["num_attention_groups"], raw["head_dim"]
        scaling = raw["rope_scaling"] if full else None
        width = int(dim * raw["partial_rotary_factors"][i])
        theta = raw["rope_theta"][i]
        length = len(x)
        out = np.zeros((length, heads, dim))
        q = (x @ self.t[p + "q_proj.weight"].T).reshape(length, heads, dim)
        k = (x @ self.t[p + "k_proj.weight"].T).reshape(length, groups, dim)
        v = (x @ self.t[p + "v_proj.weight"].T).reshape(length, groups, dim)
        q, k = norm(q, self.t[p + "q_norm.weight"]), norm(k, self.t[p + "k_norm.weight"])
        for position in range(length):
            for h in range(heads):
                q[position, h] = turn(q[position, h], position, theta, width, scaling)
            for h in range(groups):
                k[position, h] = turn(k[position, h], position, theta, width, scaling)
        for position in range(length):
            first = 0 if full else max(0, position - raw["sliding_window"] + 1)
            for h in range(heads):
                j = h // (heads // groups)
                scores = k[first : position + 1, j] @ q[position, h] / math.sqrt(dim)
                weights = np.exp(scores - scores.max())
                out[position, h] = weights @ v[first : position + 1, j] / weights.sum()
        gate = sigmoid(x @ self.t[p + "g_proj.weight"].T)
        return (out * gate[:, :, None]).reshape(length, -1) @ self.t[p + "o_proj.weight"].T

    def feed_forward(self, i: int, x: Array) -> Array:
        raw, p = self.raw, f"model.layers.{i}."
        shared_limit, limit = raw["swiglu_limits_shared"][i], raw["swiglu_limits"][i]
        dense = p + ("share_expert." if i in self.moe_layers else "mlp.")
        names = ("gate_proj", "up_proj", "down_proj")
        shared = [self.t[f"{dense}{name}.weight"] for name in names]
        out = np.stack([swiglu(row, *shared, shared_limit or 0.0) for row in x])
        if i not in self.moe_layers:
            return out
        for row_idx, row in enumerate(x):
            scores = sigmoid(self.t[p + "moe.gate.weight"] @ row)
            chosen = np.argsort(-(scores + self.t[p + "moe.router_bias"]), kind="stable")[: raw["moe_top_k"]]
            weights = scores[chosen] / scores[chosen].sum() * raw["moe_router_scaling_factor"]
            for expert, weight in zip(chosen, weights, strict=True):
                parts = [self.t[f"{p}moe.{name}.weight"][expert] for name in names]
                out[row_idx] += weight * swiglu(row, *parts, limit or 0.0)
        return out

    def layer(self, i: int, x: Array) -> Array:
        p = f"model.layers.{i}."
        x = x + self.attention(i, norm(x, self.t[p + "input_layernorm.weight"]))
        return x + self.feed_forward(i, norm(x, self.t[p + "post_attention_layernorm.weight"]))

    def hidden(self, ids: list[int]) -> Array:
        x = self.t["model.embed_tokens.weight"][ids]
        for i in range(self.raw["num_hidden_layers"]):
            x = self.layer(i, x)
        return x

    def logits(self, ids: list[int]) -> Array:
        return norm(self.hidden(ids), self.t["model.norm.weight"]) @ self.t["lm_head.weight"].T

    def mtp_logits(self, ids: list[int]) -> list[Array]:
        """Module k's logits at positions 0 .. len(ids) - 1 - k."""
        u, result = self.hidden(ids), []
        for k in range(1, self.raw["num_nextn_predict_layers"] + 1):
            i = self.raw["num_hidden_layers"] + k - 1
            p = f"model.layers.{i}."
            known = len(ids) - k
            tokens = norm(self.t["model.embed_tokens.weight"][ids[k:]], self.t[p + "enorm.weight"])
            states = norm(u[:known], self.t[p + "hnorm.weight"])
            x = np.concatenate([tokens, states], axis=1) @ self.t[p + "eh_proj.weight"].T
            u = self.layer(i, x)
            head = p + "transformer.shared_head."
            result.append(norm(u, self.t[head + "norm.weight"]) @ self.t[head + "output.weight"].T)
        return result
