"""`cohortium console verify-journal FILE --key KEY`: check an exported journal offline, on any laptop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cohortium.common.errors import UsageError
from cohortium.common.protocol.signing import fingerprint, load_public, public_from_raw
from cohortium.common.terminal import emit, failures, out


def verify_journal_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The exported journal (JSONL).")],
    key: Annotated[str, typer.Option("--key", help="The coordinator's public key: 64 hexadecimal digits, or a file.")],
    head: Annotated[
        str, typer.Option("--head", help='The head that the audit page shows: "SIZE HASH", or the hash.')
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Check every line, hash and signature of an exported journal, and that its end is not missing."""
    with failures(as_json=as_json):
        from cohortium.server.console.journal import verify_journal

        public = _key(key)
        found = verify_journal(file, public, head=head)
        facts = {"ok": True, "size": found.size, "hash": found.hash, "key": fingerprint(public), "compared": bool(head)}

        def show() -> None:
            out.print(f"{found.size} lines, every hash and signature, and the signed head:", markup=False)
            out.print(found.hash, markup=False, soft_wrap=True)
            out.print(f"signed by {fingerprint(public)}", markup=False, soft_wrap=True)
            if not head:
                out.print(
                    "Compare the head with the audit page, or name it with --head: an older export has an older one."
                )
            out.print("[bold green]Everything holds.[/]")

        emit(facts, as_json=as_json, show=show)


def _key(text: str) -> Ed25519PublicKey:
    if len(text) == 64:
        try:
            return public_from_raw(bytes.fromhex(text))
        except ValueError:
            pass
    if not Path(text).is_file():
        raise UsageError("JOURNAL-KEY", "a key is 64 hexadecimal digits or a file", hint="the audit page shows it")
    return load_public(Path(text))
