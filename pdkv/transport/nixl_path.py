"""Which path NIXL's reads of a peer take: NIXL does not tell, but its UCX writes down what it chooses."""

import contextlib
import re
import tempfile
from pathlib import Path

_FILE = re.compile(r"_cfg_(\d+)_get_.*_(\d+)_(\d+|inf)\.dot$")
"""The files of reads, by the endpoint's configuration and the lengths that the choice is for."""

_LABEL = re.compile(r'node0 \[label="([^"]*)"')
"""What was chosen, as in node0 [label="zero-copy\\nrc_mlx5/mlx5_0:1" shape=box]."""


class ChosenPath:
    """Where UCX writes what it chooses for reads, until it has been read: a folder for one agent and one peer."""

    def __init__(self) -> None:
        try:
            self._folder: tempfile.TemporaryDirectory[str] | None = tempfile.TemporaryDirectory(prefix="pdkv-nixl-")
        except OSError:
            self._folder = None  # nowhere to write: the path stays unknown, and reads work

    @property
    def settings(self) -> dict[str, str]:
        """What UCX is to be told. The pattern fits the names of its files, and not the titles of the tables that it
        would print as well."""
        return {"PROTO_INFO": "get*", "PROTO_INFO_DIR": self._folder.name} if self._folder is not None else {}

    def read(self) -> str:
        """UCX's words for reads of all lengths, long ones first: "zero-copy cma/memory"; empty when it wrote none, or
        none that can be read: whoever reads pages should not fail for want of words."""
        if self._folder is None:
            return ""
        try:
            return _words(Path(self._folder.name))
        except OSError:
            return ""

    def close(self) -> None:
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.cleanup()
        self._folder = None


def _words(folder: Path) -> str:
    found = [(match, file) for file in folder.iterdir() if (match := _FILE.search(file.name))]
    found = [(match, file) for match, file in found if match[3] != "0"]
    last = max((int(match[1]) for match, _ in found), default=0)  # earlier ones are of before it was connected
    found.sort(key=lambda each: int(each[0][2]), reverse=True)
    labels = []
    for match, file in found:
        label = _LABEL.search(file.read_text(encoding="utf-8", errors="replace"))
        if int(match[1]) == last and label:
            labels.append(" ".join(label[1].replace("\\n", " ").split()))
    return "; ".join(dict.fromkeys(labels))
