"""Planting a bug: a piece of a function's source is replaced, in this process, for the length of a `with`."""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def planted(function: Callable[..., Any], *replacements: tuple[str, str]) -> Iterator[None]:
    """Run with `function` as if its source said `new` wherever a pair (old, new) finds `old`, exactly once.

    Only the code object is exchanged, so everybody who imported the function runs the bug. Fails if the source
    no longer holds `old`: a bug that cannot be planted guards nothing.
    """
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in replacements:
        assert source.count(old) == 1, f"{function.__qualname__}: {old!r} occurs {source.count(old)} times"
        source = source.replace(old, new)
    namespace = dict(function.__globals__)
    exec(compile("from __future__ import annotations\n" + source, "<planted>", "exec"), namespace)
    right = function.__code__
    made = namespace[function.__name__]
    function.__code__ = (made.fget if isinstance(made, property) else made).__code__
    try:
        yield
    finally:
        function.__code__ = right
