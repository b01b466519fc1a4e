"""Which life of each peer was met last: so a restart is known for one, however the life before it ended."""

from collections import OrderedDict

from pdkv.schema import Incarnation

_MOST = 1024


class Lives:
    """Owned by the agent thread. Remembers the ``most`` peers that were met last: their names may hold addresses."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._last: OrderedDict[str, Incarnation] = OrderedDict()

    def is_another(self, name: str, incarnation: Incarnation) -> bool:
        """Meet a peer; True when it was met before in another life."""
        before = self._last.pop(name, incarnation)
        self._last[name] = incarnation
        if len(self._last) > self._most:
            self._last.popitem(last=False)
        return before != incarnation
