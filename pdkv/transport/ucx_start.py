"""UCX's start, again where a network interface came or went meanwhile.

UCX lists a machine's interfaces and then opens each; one that has gone by then, or has no address yet, ends the start
with an error. Containers come with interfaces of their own, so on a host's network that is any time.
"""

import time
from collections.abc import Callable
from typing import TypeVar

_TRIES = 8
_PAUSE_S = 0.1
"""An interface is made in a few milliseconds."""

Started = TypeVar("Started")


def started(start: Callable[[], Started], may_pass: Callable[[Exception], bool]) -> Started:
    """What ``start`` returns, tried anew for up to a second while it raises what may pass; then that is raised."""
    for _ in range(_TRIES - 1):
        try:
            return start()
        except Exception as error:
            if not may_pass(error):
                raise
        time.sleep(_PAUSE_S)
    return start()
