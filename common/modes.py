"""File modes of keys and of the directories that hold them: refused when others may look, with the command to run.

Asked at every start and by `check`; whoever makes a key makes it closed from the first moment (signing.save_private).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from cohortium.common.errors import Refused, UsageError

DIRECTORY = 0o700
KEY = 0o600


def refuse_open(path: Path, *, group: bool = False) -> None:
    """Return if only its owner may use `path`, a key file or a directory of keys.

    group: the group may have access too (a socket's directory, shared by guard and courier).
    Raises UsageError MODE-MISSING when nothing is there; Refused MODE-OPEN when group or others have any access,
    when it belongs to neither this process's user nor root, or when it is a link: what a link leads to can be
    exchanged by whoever may write beside it.
    """
    found = too_open(path, group=group)
    if found is not None:
        raise found


def refuse_all(paths: Iterable[Path]) -> None:
    """`refuse_open` for each of them that exists."""
    for path in paths:
        if os.path.lexists(path):
            refuse_open(path)


def too_open(path: Path, *, group: bool = False) -> Refused | None:
    """What `refuse_open` would raise, or None; for a table of checks."""
    try:
        status = os.lstat(path)
    except OSError:
        raise UsageError("MODE-MISSING", "there is no such file or directory", where=(str(path),)) from None
    if stat.S_ISLNK(status.st_mode):
        return Refused(
            "MODE-OPEN",
            "a key or its directory may not be a symbolic link",
            where=(str(path),),
            hint=f"replace the link {path} by what it leads to",
        )
    wanted = DIRECTORY if stat.S_ISDIR(status.st_mode) else KEY
    if status.st_uid not in (os.geteuid(), 0) and os.geteuid() != 0:
        return Refused(
            "MODE-OPEN", "it belongs to another user", where=(str(path),), hint=f"chown {os.geteuid()} {path}"
        )
    mode = stat.S_IMODE(status.st_mode)
    forbidden = 0o007 if group else 0o077
    if mode & forbidden:
        who = "others" if group else "group or others"
        return Refused(
            "MODE-OPEN",
            f"{who} may use it (mode {mode:04o})",
            where=(str(path),),
            hint=f"chmod {wanted | (0o070 if group and wanted == DIRECTORY else 0):o} {path}",
        )
    return None


def make_private(path: Path, mode: int = DIRECTORY) -> Path:
    """A directory with exactly this mode, made with its parents; closed from the first moment, whatever the umask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=mode & 0o700, exist_ok=True)
    os.chmod(path, mode)
    return path


def write_private(path: Path, data: bytes, mode: int = KEY) -> None:
    """Replace a file as a whole, flushed; as root it goes to the owner of its directory.

    The new file is made under another name and never through a link: whoever owns the directory cannot make root
    write elsewhere.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    beside.unlink(missing_ok=True)
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(file.fileno(), mode)
        if os.geteuid() == 0:
            owner = os.stat(path.parent)
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def make_like_parent(path: Path) -> Path:
    """A private directory that belongs to the owner of the one it lies in."""
    if not path.is_dir():
        make_private(path)
        if os.geteuid() == 0:
            owner = os.stat(path.parent)
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
    return path
