"""Small multiples of the private evaluation: a column's synthetic bars against its noised held-out shares."""

from __future__ import annotations

from cohortium.common.evaluation.findings import Shares
from cohortium.common.evaluation.pictures import Identifiers, cell_labels, frame, share_axis, short
from cohortium.common.evaluation.report_text import interval

TOP, BOTTOM, LEFT, RIGHT = 8.0, 108.0, 34.0, 246.0


def shares_picture(ids: Identifiers, shares: Shares) -> str:
    """Bars: synthetic; line and band: held-out and what the noise leaves; crosses: exact, in a simulation only.

    A noised share below 0 is drawn at 0; the table behind the picture has the number.
    """
    n = max(len(shares.labels), 1)
    step = (RIGHT - LEFT) / n
    most = max([*shares.synthetic, *shares.real, *shares.exact, 1e-9])
    most = max(most, min(max(shares.high, default=0.0), 1.5 * most))
    scale = (BOTTOM - TOP) / (most * 1.04)

    def down(share: float) -> float:
        return BOTTOM - min(max(share, 0.0), most * 1.04) * scale

    body = share_axis(most, TOP, BOTTOM, LEFT, RIGHT, scale)
    for i, share in enumerate(shares.synthetic):
        body.append(
            f'<rect class="syn" x="{short(LEFT + (i + 0.14) * step)}" y="{short(down(share))}" '
            f'width="{short(step * 0.72)}" height="{short(BOTTOM - down(share))}"/>'
        )
    for i, (real, low, high) in enumerate(zip(shares.real, shares.low, shares.high)):
        x = short(LEFT + i * step)
        body.append(
            f'<rect class="band" x="{x}" y="{short(down(high))}" width="{short(step)}" '
            f'height="{short(max(down(low) - down(high), 0.6))}"/>'
            f'<path class="real" d="M{x} {short(down(real))}h{short(step)}"/>'
        )
    for i, share in enumerate(shares.exact):
        size = min(3.5, step * 0.4)
        left, top = LEFT + (i + 0.5) * step - size, down(share) - size
        whole = short(2 * size)
        body.append(
            f'<path class="exact" d="M{short(left)} {short(top)}l{whole} {whole}m0 -{whole}l-{whole} {whole}"/>'
        )
    body += cell_labels(shares.labels, LEFT, RIGHT, step, BOTTOM + 14)
    desc = (
        f"Shares in {len(shares.labels)} cells, synthetic rows against held-out patients. "
        f"Distance {interval(shares.distance)}."
    )
    return frame(ids, 140, f"Column {shares.name}, held-out patients and synthetic rows", desc, body, width=250)
