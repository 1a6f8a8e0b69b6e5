"""A neural autoregressive density over bins (Larochelle & Murray 2011), per-row gradients in closed form.

Columns in the dictionary's order; with x_c the bin of column c:
    a_c = b + Σ_{j<c} E_j[x_j]      h_c = relu(a_c)      p(x_c | x_<c) = softmax(h_c V_c + o_c)
and the loss of a row is −Σ_c log p(x_c | x_<c). With δ_c = p − onehot(x_c), g_c = (V_c δ_c)·1[a_c > 0] and
s_j = Σ_{c>j} g_c, the row's gradient is δ_c for o_c, h_c ⊗ δ_c for V_c, s_j on one row of E_j and Σ_c g_c for
b. So its norm needs no gradient:
    ‖g‖² = Σ_c (1 + ‖h_c‖²) ‖δ_c‖² + ‖Σ_c g_c‖² + Σ_j ‖s_j‖².
Everything is float64. Products run in blocks of one fixed number of rows, the last one padded with rows of
weight 0: matrix libraries take other kernels for the rows left over at an edge, and a row's gradient must
not depend on how many rows stand beside it. CUDA libraries choose kernels by shape too, so one shape is one
kernel; that rows of one block are alike there as well is not tested yet.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cohortium.common.errors import ProtocolError
from cohortium.common.generators.base import Floats
from cohortium.common.generators.threads import one_thread, torch

BLOCK_ROWS = 1056  # 11 · 96, a multiple of every kernel's tile (8, 12, 16, 24, 32, 48): no row is at an edge
LEAST_BLOCK_ROWS = 96
BLOCK_CELLS = 40_000_000  # rows × (hidden·columns + bins) held at once
MOST_HIDDEN = 256
MOST_BINS = 1_000_000
HOST = "cpu"

Bins2 = NDArray[np.integer[Any]]
if TYPE_CHECKING:
    Weights = tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]
    """b, and (E_c, V_c, o_c) of each column."""


class Nade:
    """spec: {"kind": "nade", "bins": [bins of each column], "hidden": H}. The parameters are one vector:
    b [H], then for each column E_c [bins, H] (not the last), V_c [H, bins], o_c [bins]."""

    def __init__(self, spec: Mapping[str, Any], *, device: str | None = None) -> None:
        """device: where it computes; CUDA where there is one, else the processor. Both in float64."""
        self._named = device
        bins, hidden = spec.get("bins"), spec.get("hidden")
        wrong = ProtocolError("NETWORK-SPEC", "a nade needs a list of bins >= 1 and hidden between 1 and 256")
        if not isinstance(bins, list) or not bins or not all(type(b) is int and b >= 1 for b in bins):
            raise wrong
        if type(hidden) is not int or not 1 <= hidden <= MOST_HIDDEN or sum(bins) > MOST_BINS:
            raise wrong
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

    @cached_property
    def _device(self) -> torch.device:
        """Looked for when it computes: whoever asks for a size alone does not load torch."""
        return torch.device(self._named or ("cuda" if torch.cuda.is_available() else HOST))

    @cached_property
    def _first(self) -> torch.Tensor:
        return torch.tensor(np.cumsum((0, *self.bins[:-1])))[:, None].to(self._device)

    @property
    def block_rows(self) -> int:
        """Rows of every product of `gradient_sum`: public, from the spec alone."""
        cells = self.hidden * len(self.bins) * 3 + 2 * sum(self.bins)
        fit = BLOCK_CELLS // cells // LEAST_BLOCK_ROWS * LEAST_BLOCK_ROWS
        return max(LEAST_BLOCK_ROWS, min(BLOCK_ROWS, fit))

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

    def _split(self, parameters: NDArray[Any], device: torch.device | str) -> Weights:
        flat = torch.as_tensor(parameters, dtype=torch.float64, device=device)
        h = self.hidden
        parts = []
        for c, (e, v, o, end) in enumerate(self._spans):
            size = self.bins[c]
            parts.append((flat[e:v].view(-1, h), flat[v:o].view(h, size), flat[o:end]))
        return flat[:h], parts

    def gradient_sum(self, parameters: NDArray[np.float32], bins: Bins2, row_weight: Floats, clip: float) -> Floats:
        """Σ_r w_r · min(1, C/‖g_r‖) · g_r, float64 [d]. A row whose norm is not finite adds nothing.

        Guarantees: a row's term is the same to the last bit wherever it stands, whoever stands beside it, and
        has norm ≤ w_r·C but for 1e-9 of it: the norm is a sum of squares of the very numbers that are
        added. What the float64 sum of n rows of weight 1 adds to that is at most
        (block_rows + 8) · 2^−53 · n · C: the usual bound of a sum inside a block, whatever its order, and blocks
        are added without loss.
            no rows     zeros       weight 0    nothing at all
        """
        total = torch.zeros(self.size, dtype=torch.float64, device=self._device)
        lost = torch.zeros_like(total)
        each, weights = self.block_rows, self._split(parameters, self._device)
        with one_thread():  # matrices this thin only get slower, and sums keep one order
            for at in range(0, len(bins), each):
                some, weight = _padded(bins[at : at + each], row_weight[at : at + each], each)
                _add_exactly(total, lost, self._block(weights, some, weight, clip)[0])
        return (total + lost).cpu().numpy()

    def plain_gradient(self, parameters: NDArray[np.float32], bins: Bins2, row_weight: Floats) -> Floats:
        """Σ_r w_r · g_r, float64 [d]: not clipped, for no release; what DP-SGD is measured against."""
        with one_thread():
            return self._block(self._split(parameters, self._device), bins, row_weight, None)[0].cpu().numpy()

    def row_gradient(self, parameters: NDArray[np.float32], bins: Bins2) -> Floats:
        """The gradient of one row, unclipped."""
        one = np.asarray(bins)[None, :]
        return self._block(self._split(parameters, self._device), one, np.ones(1), None)[0].cpu().numpy()

    def losses(self, parameters: NDArray[np.float32], bins: Bins2) -> Floats:
        """−log p of each row."""
        p = self._block(self._split(parameters, self._device), bins, np.ones(len(bins)), None)[1]
        return -torch.log(p.clamp(min=1e-300)).sum(0).cpu().numpy()

    def log_given_others(self, parameters: NDArray[np.float32], bins: Bins2, column: int) -> Floats:
        """log p(column | all others) of each of its bins, up to a constant of the row: [rows, bins of the column].

        In float32, on the processor, as `draw`; what the rows hold in the column does not count.
        """
        bias, parts = self._split(parameters, HOST)
        before = np.repeat(bias.float().numpy()[:, None], len(bins), axis=1)
        for c in range(column):
            before += parts[c][0].float().numpy().T.take(bins[:, c], axis=1)
        own = _log_softmax(before, parts[column])
        for level in range(self.bins[column] if column < len(parts) - 1 else 0):
            a = before + parts[column][0].float().numpy()[level][:, None]
            for c in range(column + 1, len(parts)):
                own[level] += np.take_along_axis(_log_softmax(a, parts[c]), bins[None, :, c], 0)[0]
                if c < len(parts) - 1:
                    a += parts[c][0].float().numpy().T.take(bins[:, c], axis=1)
        return np.ascontiguousarray(own.T, dtype=np.float64)

    def _block(
        self, weights: Weights, bins: Bins2, row_weight: Floats, clip: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(Σ_r w_r · min(1, C/‖g_r‖) · g_r, p of the bin of each row [columns, rows]).

        δ of all columns lie in one [bins, rows]: sums over bins vectorise.
        """
        bias, parts = weights
        kind: Any = {"dtype": torch.float64, "device": self._device}
        x = torch.as_tensor(np.array(bins.T, dtype=np.int64, order="C"), device=self._device)
        columns, rows = x.shape
        hidden = torch.empty(columns, rows, self.hidden, **kind)
        hidden[0] = bias
        for c, (before, _, _) in enumerate(parts[:-1]):
            torch.index_select(before, 0, x[c], out=hidden[c + 1])
            hidden[c + 1] += hidden[c]
        hidden.clamp_(min=0.0)
        after, delta = torch.empty_like(hidden), torch.empty(sum(self.bins), rows, **kind)
        deltas = delta.split_with_sizes(self.bins)
        for d, h, (_, head, level) in zip(deltas, hidden, parts, strict=True):
            _product(head.T, h.T, out=d).add_(level[:, None])
            _exp_(d.sub_(d.amax(0))).div_(d.sum(0))
        mine = x + self._first
        p = delta.gather(0, mine)
        delta.scatter_(0, mine, p - 1.0)
        for c, (_, head, _) in enumerate(parts):
            _product(deltas[c].T, head.T, out=after[c])
        torch.ops.aten.threshold_backward.grad_input(after, hidden, 0.0, grad_input=after)  # g · 1[a > 0]
        # s_j = Σ_{c>j} g_c; summed from the end, entry 0 is Σ_c g_c, the gradient of b.
        for c in range(columns - 2, -1, -1):
            after[c] += after[c + 1]
        weight = torch.as_tensor(row_weight, **kind)
        if clip is not None:
            norm = torch.sqrt(self._norm_sq(hidden, after, deltas))
            finite = torch.isfinite(norm)
            weight = torch.where(finite, weight * (clip / norm.clamp(min=clip)), torch.zeros_like(norm))
            if not bool(finite.all()):  # 0 · NaN would still be NaN
                for part in (after, hidden, delta):
                    part.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        delta.mul_(weight)
        after.mul_(weight[:, None])
        out = torch.zeros(self.size, **kind)
        out[: self.hidden] = after[0].sum(0)
        for c, (e, v, o, end) in enumerate(self._spans):
            _product(hidden[c].T, deltas[c].T, out=out[v:o].view(self.hidden, -1))
            out[o:end] = deltas[c].sum(1)
            if c < columns - 1:
                _add_rows(out[e:v].view(-1, self.hidden), x[c], after[c + 1])
        return out, p

    def _norm_sq(self, hidden: torch.Tensor, after: torch.Tensor, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        """‖g‖² of each row, from the numbers that its gradient is made of: [rows]."""
        columns, rows, units = hidden.shape
        outer = _squares(hidden.view(-1, units), 1).view(columns, rows).add_(1.0)
        square = _squares(after.view(-1, units), 1).view(columns, rows).sum(0)
        for c, d in enumerate(deltas):
            square.addcmul_(outer[c], _squares(d, 0))
        return square

    def draw(
        self,
        parameters: NDArray[np.float32],
        rows: int,
        rng: np.random.Generator,
        shares: Mapping[int, Floats] | None = None,
    ) -> tuple[NDArray[np.int64], Floats]:
        """Bins [rows, columns], and each row's log weight: how likely its history made the conditions.

        A column's numbers lie in [bins, rows], in float32, on the processor whatever device trained the model.
        """
        bias, parts = self._split(parameters, HOST)
        out, log_weight = np.empty((len(self.bins), rows), dtype=np.int64), np.zeros(rows)
        a = np.repeat(bias.float().numpy()[:, None], rows, axis=1)
        active, cells = np.empty_like(a), np.empty((max(self.bins), rows), dtype=np.float32)  # taken up again and again
        for c, (embed, head, level) in enumerate(parts):
            np.maximum(a, np.float32(0.0), out=active)
            p = np.matmul(head.float().numpy().T, active, out=cells[: self.bins[c]])
            p += level.float().numpy()[:, None]
            p -= p.max(axis=0)
            np.exp(p, out=p)
            if shares and c in shares:
                share = shares[c].astype(np.float32)[:, None]
                free = p.sum(axis=0)
                p *= share
                held = p.sum(axis=0)
                log_weight += np.log(np.maximum(held / free, np.float32(1e-30)))
                p[:, held <= 0] = share > 0
            for before, here in itertools.pairwise(p):  # NumPy's own sum along this axis is fifty times slower
                here += before
            u = rng.random(rows, dtype=np.float32) * p[-1]
            np.minimum(u, np.nextafter(p[-1], np.float32(0.0)), out=u)  # rounding must not reach a last bin of weight 0
            narrow = np.uint8 if len(p) <= 256 else np.int64
            out[c] = (p[:-1] <= u).view(np.uint8).sum(axis=0, dtype=narrow)
            if c < len(parts) - 1:
                a += embed.float().numpy().T.take(out[c], axis=1, out=active, mode="clip")
        return out.T, log_weight


def _log_softmax(a: NDArray[np.float32], part: tuple[torch.Tensor, ...]) -> NDArray[np.float32]:
    """log p of each bin of a column [bins, rows], from the sums before it [hidden, rows]."""
    _, head, level = part
    z: NDArray[np.float32] = np.matmul(head.float().numpy().T, np.maximum(a, np.float32(0.0)))
    z += level.float().numpy()[:, None]
    z -= z.max(axis=0)
    z -= np.log(np.exp(z).sum(axis=0))
    return z


def _padded(bins: Bins2, row_weight: Floats, rows: int) -> tuple[Bins2, Floats]:
    """Exactly `rows` rows: those missing have weight 0 and lie in bin 0 of every column."""
    if len(bins) == rows:
        return bins, row_weight
    some, weight = np.zeros((rows, bins.shape[1]), dtype=bins.dtype), np.zeros(rows)
    some[: len(bins)], weight[: len(bins)] = bins, row_weight
    return some, weight


def _add_exactly(total: torch.Tensor, lost: torch.Tensor, more: torch.Tensor) -> None:
    """total += more, and to `lost` what rounding drops (two-sum, Knuth): no error grows with the blocks."""
    before = total.clone()
    total += more
    here = total - before
    lost += (before - (total - here)) + (more - here)


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b. On the processor by NumPy: its BLAS is two to three times faster than torch's here."""
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
