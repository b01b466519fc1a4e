"""Page numbers for loops over tiles that Triton pipelines."""

import triton
import triton.language as tl


@triton.jit
def next_page(at, ASIDE: tl.constexpr):
    """int64: the page number at a pointer, for the next turn of a loop. It is read even if there is no turn at all.

    ASIDE, NVIDIA only: by an instruction that the pipeline does not know. Loads that it does know become asynchronous
    copies in one queue; to wait for this one a turn later is then to wait for all tiles on their way, and nothing
    travels while a tile is multiplied, however many stages there are.
    """
    if ASIDE:
        page = tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        page = tl.load(at)
    return page.to(tl.int64)
