"""Types of what looks at and cuts spans; its promises are in native/spans.h."""

from pdkv.schema import Int64Array

class Bounds:
    def __init__(self, far: list[int], near: list[tuple[int, int]]) -> None: ...

def survey(
    bounds: Bounds,
    memory: Int64Array,
    remote: Int64Array,
    local: Int64Array,
    length: Int64Array,
    long_bytes: int,
) -> tuple[bool, bool, bool, int]: ...

class Cutter:
    def __init__(
        self,
        bases: Int64Array,
        memory: Int64Array,
        remote: Int64Array,
        local: Int64Array,
        length: Int64Array,
        long_bytes: int,
        piece_bytes: int,
    ) -> None: ...
    def fill(self, table: Int64Array) -> int: ...
