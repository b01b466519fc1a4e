"""Whether a file is still the one that was read: for what an operator replaces under a running daemon."""

import os
from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """Changes with the file, also where a link to it is turned to another, as in a volume of Kubernetes."""

    device: int
    inode: int
    size: int
    changed_ns: int


def file_state(file: Path) -> FileState | None:
    """None where there is no such file, or none that may be looked at."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return FileState(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
