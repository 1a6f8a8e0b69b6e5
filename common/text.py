"""Text that comes from people and sites, made fit to be shown."""

from __future__ import annotations

import unicodedata

_UNFIT = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})


def clean(text: object, *, lines: bool = False) -> str:
    """Control and direction-changing characters, lone surrogates: U+FFFD. With `lines`, breaks and tabs stay."""
    kept = "\n\r\t" if lines else ""
    return "".join(ch if ch in kept or unicodedata.category(ch) not in _UNFIT else "\ufffd" for ch in str(text))
