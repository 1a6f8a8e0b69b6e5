"""What a password of the console has to be like; drawn ones; and the hash that stands for nobody's."""

from __future__ import annotations

import secrets

from cohortium.common.errors import UsageError

LEAST_PASSWORD, LEAST_KINDS = 12, 5
MOST_PASSWORD = 200
NOBODY = "$argon2id$v=19$m=65536,t=3,p=4$3iZVtEmbf/VeQ5oNN7M49g$7Gb2oUpZBpMeaIUzV5LrVaxpAJkYziaZDQKEB7FcwuI"
"""A hash of 256 random bits that were thrown away: looked at where there is no password, so that it takes as long."""


def one_time_password() -> str:
    """For somebody else, who changes it at the first sign-in: 96 bits, in four groups that can be read out."""
    letters = secrets.token_hex(12)
    return "-".join(letters[start : start + 6] for start in range(0, 24, 6))


def checked(password: str, name: str) -> str:
    """The password, or UsageError ACCOUNT-PASSWORD: too short, too long, or too easy to guess."""
    if not LEAST_PASSWORD <= len(password) <= MOST_PASSWORD:
        raise UsageError("ACCOUNT-PASSWORD", f"a password has {LEAST_PASSWORD} to {MOST_PASSWORD} characters")
    plain = password.lower()
    named = len(name) >= 4 and name in plain and len(plain) - len(name) < LEAST_PASSWORD
    if len(set(plain)) < LEAST_KINDS or named:
        raise UsageError(
            "ACCOUNT-PASSWORD",
            "this password is too easy to guess",
            hint="several words that have nothing to do with each other, and not the account's name",
        )
    return password
