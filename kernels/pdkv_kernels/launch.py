"""How kernels are launched one behind another.

Where the device can, each starts before the one in front of it has ended, and waits inside (``gdc_wait``) before it
touches memory. What it waits for has itself waited, so then all that came before is done, however early a kernel lets
its successors start: after its own wait, or at once where nothing is gained by holding them back.
"""

from pdkv_kernels.hardware import hardware

FEW_PROGRAMS = 16
"""So few leave the machine as good as empty: what starts beside them finds room everywhere alike."""


def chained() -> bool:
    """Whether kernels may be launched before the one in front of them has ended, and wait inside.

    On NVIDIA from Hopper on. It hides most of a launch where launches follow each other in a few microseconds; every
    kernel so launched waits for its predecessor before it touches memory.
    """
    return hardware().capability >= 90


def stages_that_fit(most: int, stage_bytes: int, beside: int) -> int:
    """Stages of a loop, up to ``most``: all but one of them hold tiles in shared memory, ``beside`` other bytes."""
    return max(1, min(most, 1 + (hardware().shared_bytes - beside) // stage_bytes))


def launch_options(early: bool, num_warps: int, num_stages: int) -> dict[str, int]:
    """Keyword arguments of a Triton launch. Other back ends refuse ``launch_pdl``, even when it is false."""
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return {**options, "launch_pdl": True} if early else options
