"""`cohortium site page`: the hospital's page, in a browser on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cohortium.common.terminal import err, failures


def page(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The site's directory.")],
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port on 127.0.0.1; 0: a free one.")] = 0,
    idle: Annotated[float, typer.Option(min=0.1, max=1440, help="Minutes without a look after which it ends.")] = 30,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the link and start no browser.")] = False,
    host: Annotated[str, typer.Option(help="127.0.0.1 is the only one: the page is for this machine.")] = "127.0.0.1",
) -> None:
    """Look in a browser at what left here and what is asked next; approve, decline, pause. On this machine only."""
    with failures():
        from cohortium.client.page.serving import serve

        serve(
            directory,
            host=host,
            port=port,
            idle_min=idle,
            browser=not no_browser,
            say=lambda text: err.print(text, markup=False, soft_wrap=True),
        )
