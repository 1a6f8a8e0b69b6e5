"""A neural autoregressive density over bins (Larochelle & Murray 2011), with per-row gradients in closed form.

Columns in the dictionary's order; with x_c the bin of column c:
    a_c = b + Σ_{j<c} E_j[x_j]      h_c = relu(a_c)      p(x_c | x_<c) = softmax(h_c V_c + o_c)
and the loss of a row is −Σ_c log p(x_c | x_<c). With δ_c = p − onehot(x_c), g_c = (V_c δ_c)·1[a_c > 0] and
s_j = Σ_{c>j} g_c, the row's gradient is δ_c for o_c, h_c ⊗ δ_c for V_c, s_j on one row of E_j and Σ_c g_c for b.
So its norm needs no gradient:
    ‖g‖² = Σ_c (1 + ‖h_c‖²) ‖δ_c‖² + ‖Σ_c g_c‖² + Σ_j ‖s_j‖².
Everything is float64: the sums of different batches then differ by far less than a lattice unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cohortium.common.errors import ProtocolError
from cohortium.common.generators.base import Floats

CHUNK_CELLS = 40_000_000  # rows × (hidden·columns + bins) held at once
MOST_HIDDEN = 256
MOST_BINS = 1_000_000

Bins2 = NDArray[np.integer[Any]]


class Nade:
    """spec: {"kind": "nade", "bins": [bins of each column], "hidden": H}. The parameters are one vector:
    b [H], then for each column E_c [bins, H] (not the last), V_c [H, bins], o_c [bins]."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        bins, hidden = spec.get("bins"), spec.get("hidden")
        good = isinstance(bins, list) and bins and all(type(b) is int and b >= 1 for b in bins)
        if not good or type(hidden) is not int or not 1 <= hidden <= MOST_HIDDEN or sum(bins) > MOST_BINS:
            raise ProtocolError("NETWORK-SPEC", "a nade needs a list of bins >= 1 and hidden between 1 and 256")
        self.bins: tuple[int, ...] = tuple(bins)
        self.hidden: int = hidden
        self._spans: list[tuple[int, int, int, int]] = []  # starts of E_c, V_c, o_c and the end
        at = hidden
        for c, size in enumerate(self.bins):
            e = at
            v = e + (size * hidden if c < len(self.bins) - 1 else 0)
            o = v + hidden * size
            at = o + size
            self._spans.append((e, v, o, at))
        self.size = at

    @property
    def spec(self) -> dict[str, Any]:
        return {"kind": "nade", "bins": list(self.bins), "hidden": self.hidden}

    def start(self, one_way: tuple[Floats, ...], *, seed: int, scale: float = 0.3) -> NDArray[np.float32]:
        """Random weights of standard deviation `scale`, output biases the log of the one-ways."""
        rng = np.random.default_rng([seed, 0x6E61])
        out = np.zeros(self.size)
        for c, (e, v, o, end) in enumerate(self._spans):
            out[e:o] = rng.normal(0.0, scale, o - e)
            p = np.maximum(one_way[c], 1e-4)
            out[o:end] = np.log(p / p.sum())
        return out.astype(np.float32)

    def _split(self, parameters: NDArray[Any] | torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        flat = torch.as_tensor(parameters, dtype=torch.float64)
        h = self.hidden
        parts = []
        for c, (e, v, o, end) in enumerate(self._spans):
            size = self.bins[c]
            parts.append((flat[e:v].view(-1, h), flat[v:o].view(h, size), flat[o:end]))
        return flat[:h], parts

    def gradient_sum(
        self, parameters: NDArray[np.float32], bins: Bins2, row_weight: Floats, clip: float
    ) -> Floats:
        """Σ_r w_r · min(1, C/‖g_r‖) · g_r, float64 [d]. A row whose norm is not finite adds nothing."""
        total = torch.zeros(self.size, dtype=torch.float64)
        each = max(1, CHUNK_CELLS // (self.hidden * len(self.bins) * 3 + 2 * sum(self.bins)))
        for at in range(0, len(bins), each):
            total += self._chunk(parameters, bins[at : at + each], row_weight[at : at + each], clip)[0]
        return total.numpy()

    def row_gradient(self, parameters: NDArray[np.float32], bins: Bins2) -> Floats:
        """The gradient of one row, unclipped."""
        return self._chunk(parameters, np.asarray(bins)[None, :], np.ones(1), None)[0].numpy()

    def losses(self, parameters: NDArray[np.float32], bins: Bins2) -> Floats:
        """−log p of each row."""
        return self._chunk(parameters, bins, np.ones(len(bins)), None)[1].numpy()

    def _chunk(
        self, parameters: NDArray[Any], bins: Bins2, row_weight: Floats, clip: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bias, parts = self._split(parameters)
        x = torch.as_tensor(np.ascontiguousarray(bins, dtype=np.int64))
        rows, columns = x.shape
        hidden = torch.empty(columns, rows, self.hidden, dtype=torch.float64)
        deltas: list[torch.Tensor] = []
        back = torch.empty_like(hidden)
        square = torch.zeros(rows, dtype=torch.float64)
        loss = torch.zeros(rows, dtype=torch.float64)
        a = bias.expand(rows, -1).clone()
        at = torch.arange(rows)
        for c, (e, v, o) in enumerate(parts):
            h = hidden[c].copy_(a).clamp_(min=0.0)
            delta = torch.softmax(torch.addmm(o, h, v), dim=1)
            mine = delta[at, x[:, c]]
            loss -= torch.log(mine.clamp(min=1e-300))
            delta[at, x[:, c]] = mine - 1.0
            square += (1.0 + (h * h).sum(1)) * (delta * delta).sum(1)
            torch.mm(delta, v.T, out=back[c])
            back[c].mul_(h > 0)
            deltas.append(delta)
            if c < columns - 1:
                a += e[x[:, c]]
        # s_j = Σ_{c>j} g_c; the last entry of the running sum from the end is Σ_c g_c, the gradient of b.
        after = torch.flip(torch.cumsum(torch.flip(back, [0]), 0), [0])
        square += (after * after).sum((0, 2))
        weight = torch.as_tensor(row_weight, dtype=torch.float64)
        if clip is not None:
            norm = torch.sqrt(square)
            finite = torch.isfinite(norm)
            weight = torch.where(finite, weight * (clip / norm.clamp(min=clip)), torch.zeros_like(norm))
            if not bool(finite.all()):  # 0 · NaN would still be NaN
                for part in (after, hidden, *deltas):
                    part.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        out = torch.zeros(self.size, dtype=torch.float64)
        out[: self.hidden] = weight @ after[0]
        for c, (e, v, o, end) in enumerate(self._spans):
            scaled = deltas[c] * weight[:, None]
            torch.mm(hidden[c].T, scaled, out=out[v:o].view(self.hidden, -1))
            out[o:end] = scaled.sum(0)
            if c < columns - 1:
                out[e:v].view(-1, self.hidden).index_add_(0, x[:, c], after[c + 1] * weight[:, None])
        return out, loss

    def draw(
        self,
        parameters: NDArray[np.float32],
        rows: int,
        rng: np.random.Generator,
        shares: Mapping[int, Floats] | None = None,
    ) -> tuple[NDArray[np.int64], Floats]:
        """Bins [rows, columns], and each row's log weight: how likely its history made the conditions."""
        bias, parts = self._split(parameters)
        bias = bias.float()
        out = np.empty((rows, len(self.bins)), dtype=np.int64)
        log_weight = np.zeros(rows)
        a = bias.expand(rows, -1).clone()
        for c, (e, v, o) in enumerate(parts):
            logits = torch.addmm(o.float(), a.clamp(min=0.0), v.float())
            p = torch.exp(logits - logits.amax(1, keepdim=True))
            if shares and c in shares:
                free = p.sum(1)
                p = p * torch.tensor(shares[c], dtype=torch.float32)
                held = p.sum(1)
                log_weight += torch.log((held / free).clamp(min=1e-30)).double().numpy()
                p = torch.where((held <= 0)[:, None], torch.tensor(shares[c] > 0, dtype=torch.float32), p)
            cumulative = torch.cumsum(p, 1)
            u = torch.tensor(rng.random(rows, dtype=np.float32)) * cumulative[:, -1]
            x = (cumulative <= u[:, None]).sum(1).clamp(max=self.bins[c] - 1)
            out[:, c] = x.numpy()
            if c < len(parts) - 1:
                a += e.float()[x]
        return out, log_weight
