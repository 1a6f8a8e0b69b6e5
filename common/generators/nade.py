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
from cohortium.common.generators.threads import one_thread

CHUNK_CELLS = 40_000_000  # rows × (hidden·columns + bins) held at once
MOST_HIDDEN = 256
MOST_BINS = 1_000_000
HOST = "cpu"

Bins2 = NDArray[np.integer[Any]]


class Nade:
    """spec: {"kind": "nade", "bins": [bins of each column], "hidden": H}. The parameters are one vector:
    b [H], then for each column E_c [bins, H] (not the last), V_c [H, bins], o_c [bins]."""

    def __init__(self, spec: Mapping[str, Any], *, device: str | None = None) -> None:
        """device: where it computes; CUDA where there is one, else the processor. Both in float64."""
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else HOST))
        bins, hidden = spec.get("bins"), spec.get("hidden")
        good = isinstance(bins, list) and bins and all(type(b) is int and b >= 1 for b in bins)
        if not good or type(hidden) is not int or not 1 <= hidden <= MOST_HIDDEN or sum(bins) > MOST_BINS:
            raise ProtocolError(
                "NETWORK-SPEC", "a nade needs a list of bins >= 1 and hidden between 1 and 256"
            )
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
        for c, (e, _, o, end) in enumerate(self._spans):
            out[e:o] = rng.normal(0.0, scale, o - e)
            p = np.maximum(one_way[c], 1e-4)
            out[o:end] = np.log(p / p.sum())
        return out.astype(np.float32)

    def _split(self, parameters: NDArray[Any], device: torch.device | str) -> tuple[torch.Tensor, list[Any]]:
        flat = torch.as_tensor(parameters, dtype=torch.float64, device=device)
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
        total = torch.zeros(self.size, dtype=torch.float64, device=self._device)
        each = max(1, CHUNK_CELLS // (self.hidden * len(self.bins) * 3 + 2 * sum(self.bins)))
        with one_thread():  # matrices this thin only get slower
            for at in range(0, len(bins), each):
                total += self._chunk(parameters, bins[at : at + each], row_weight[at : at + each], clip)[0]
        return total.cpu().numpy()

    def plain_gradient(self, parameters: NDArray[np.float32], bins: Bins2, row_weight: Floats) -> Floats:
        """Σ_r w_r · g_r, float64 [d]: not clipped, for no release; what DP-SGD is measured against."""
        with one_thread():
            return self._chunk(parameters, bins, row_weight, None)[0].cpu().numpy()

    def row_gradient(self, parameters: NDArray[np.float32], bins: Bins2) -> Floats:
        """The gradient of one row, unclipped."""
        return self._chunk(parameters, np.asarray(bins)[None, :], np.ones(1), None)[0].cpu().numpy()

    def losses(self, parameters: NDArray[np.float32], bins: Bins2) -> Floats:
        """−log p of each row."""
        return self._chunk(parameters, bins, np.ones(len(bins)), None)[1].cpu().numpy()

    def _chunk(
        self, parameters: NDArray[Any], bins: Bins2, row_weight: Floats, clip: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(Σ_r w_r · min(1, C/‖g_r‖) · g_r, −log p of each row). δ lies [bins, rows]: sums over bins vectorise."""
        bias, parts = self._split(parameters, self._device)
        kind: Any = {"dtype": torch.float64, "device": self._device}
        x = torch.as_tensor(np.array(bins.T, dtype=np.int64, order="C"), device=self._device)
        columns, rows = x.shape
        hidden, after = (
            torch.empty(columns, rows, self.hidden, **kind),
            torch.empty(columns, rows, self.hidden, **kind),
        )
        deltas: list[torch.Tensor] = []
        square, loss = torch.zeros(rows, **kind), torch.zeros(rows, **kind)
        a = bias.expand(rows, -1).clone()
        for c, (e, v, o) in enumerate(parts):
            h = torch.clamp(a, min=0.0, out=hidden[c])
            delta = _product(v.T, h.T).add_(o[:, None])
            _exp_(delta.sub_(delta.amax(0))).div_(delta.sum(0))
            at = x[c][None]
            mine = delta.gather(0, at)
            loss -= torch.log(mine[0].clamp(min=1e-300))
            delta.scatter_(0, at, mine - 1.0)
            if clip is not None:
                square.addcmul_(_squares(h, 1).add_(1.0), _squares(delta, 0))
            g = _product(delta.T, v.T, out=after[c])
            torch.ops.aten.threshold_backward.grad_input(g, h, 0.0, grad_input=g)  # g · 1[a > 0] in one pass
            deltas.append(delta)
            if c < columns - 1:
                a += e.index_select(0, x[c])
        # s_j = Σ_{c>j} g_c; summed from the end, entry 0 is Σ_c g_c, the gradient of b.
        for c in range(columns - 2, -1, -1):
            after[c] += after[c + 1]
        weight = torch.as_tensor(row_weight, **kind)
        if clip is not None:
            for c in range(columns):
                square += _squares(after[c], 1)
            norm = torch.sqrt(square)
            finite = torch.isfinite(norm)
            weight = torch.where(finite, weight * (clip / norm.clamp(min=clip)), torch.zeros_like(norm))
            if not bool(finite.all()):  # 0 · NaN would still be NaN
                for part in (after, hidden, *deltas):
                    part.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        out = torch.zeros(self.size, **kind)
        out[: self.hidden] = weight @ after[0]
        for c, (e, v, o, end) in enumerate(self._spans):
            scaled = deltas[c].mul_(weight)
            _product(hidden[c].T, scaled.T, out=out[v:o].view(self.hidden, -1))
            out[o:end] = scaled.sum(1)
            if c < columns - 1:
                _add_rows(out[e:v].view(-1, self.hidden), x[c], after[c + 1].mul_(weight[:, None]))
        return out, loss

    def draw(
        self,
        parameters: NDArray[np.float32],
        rows: int,
        rng: np.random.Generator,
        shares: Mapping[int, Floats] | None = None,
    ) -> tuple[NDArray[np.int64], Floats]:
        """Bins [rows, columns], and each row's log weight: how likely its history made the conditions."""
        bias, parts = self._split(parameters, HOST)  # the same rows whatever device trained the model
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


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b. On the processor by NumPy: its BLAS is two to three times faster than torch's on such thin matrices."""
    if a.device.type != HOST:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    product = np.matmul(a.numpy(), b.numpy(), out=None if out is None else out.numpy())
    return torch.from_numpy(product) if out is None else out


def _exp_(values: torch.Tensor) -> torch.Tensor:
    if values.device.type != HOST:
        return values.exp_()
    np.exp(values.numpy(), out=values.numpy())
    return values


def _squares(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Σ v² along an axis of a matrix, without a copy of it."""
    if values.device.type != HOST:
        return (values * values).sum(axis)
    return torch.from_numpy(np.einsum("ij,ij->i" if axis else "ij,ij->j", values.numpy(), values.numpy()))


def _add_rows(table: torch.Tensor, at: torch.Tensor, rows: torch.Tensor) -> None:
    """table[at[r]] += rows[r]. On CUDA as a product: there index_add_ adds in no fixed order."""
    if table.device.type == HOST:
        table.index_add_(0, at, rows)
    else:
        one = torch.zeros(len(table), len(at), dtype=table.dtype, device=table.device)
        table += torch.mm(one.scatter_(0, at[None], 1.0), rows)
