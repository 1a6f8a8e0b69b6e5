"""Is this container well? Exit status 0 if so; otherwise 1 and a line that says what is not.

    healthcheck.py socket PATH            something accepts on that Unix socket (the guard, and the way to it)
    healthcheck.py certificate PATH       that certificate is still valid (the courier renews it in time)
    healthcheck.py ports FILE NAME...     the ports under those names in [addresses] of FILE accept on this machine

Several checks are separated by a `+`. It opens connections and sends nothing on them.
"""

from __future__ import annotations

import socket
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

PATIENCE_S = 3.0


def check_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(PATIENCE_S)
        end.connect(path)


def check_certificate(path: str) -> None:
    from cryptography import x509

    ends = x509.load_pem_x509_certificates(Path(path).read_bytes())[0].not_valid_after_utc
    if ends <= datetime.now(UTC):
        raise OSError(f"the certificate ended at {ends:%Y-%m-%d %H:%M} UTC")


def check_ports(file: str, *names: str) -> None:
    addresses = tomllib.loads(Path(file).read_text(encoding="utf-8"))["addresses"]
    for name in names:
        with socket.create_connection(("127.0.0.1", addresses[name]), PATIENCE_S):
            pass


CHECKS = {"socket": check_socket, "certificate": check_certificate, "ports": check_ports}


def main(arguments: list[str]) -> int:
    check: list[str] = []
    for word in [*arguments, "+"]:
        if word != "+":
            check.append(word)
            continue
        try:
            CHECKS[check[0]](*check[1:])
        except (OSError, ValueError, KeyError) as error:
            print(f"{' '.join(check)}: {error}")
            return 1
        check = []
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
