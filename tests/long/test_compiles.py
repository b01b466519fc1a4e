"""Everything that the engine launches for M3, compiled for each device that kernels are written for. No GPU is needed.

Each takes some six minutes of a processor, once; Triton keeps what it has compiled.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.kernels.compiled import HINTING, TARGETS, Compiled, compiled, launched_kernels

pytestmark = pytest.mark.timeout(7200)
_SPILLS = {
    "rms_norm._rms_norm": 8,
    "page_readers._sort_choices": 8,
    "sparse_attention_prefill._attend_pages": 296,
    "sparse_attention_prefill._attend_tiles": 40,
    "paged_attention_prefill._attend_dense": 264,
    "sparse_attention_decode._attend_kernel": 72,
    "paged_attention_decode._attend_kernel": 32,
    "draw._narrow": 8,  # over float32 logits; not timed with more warps, which would add in another order
}
"""Bytes of a thread, most of any case, with Triton 3.6 or 3.7.1; of all others none."""


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Future[list[Compiled]]]]:
    """All devices' compilers side by side; whoever asks for one's results waits for it."""
    with ThreadPoolExecutor(len(TARGETS)) as pool:
        yield {target: pool.submit(compiled, target) for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_everything_launched_compiles_and_fits(target: str, found: dict[str, Future[list[Compiled]]]) -> None:
    made = found[target].result()
    assert [one for one in made if one.error] == []
    assert {one.kernel for one in made} == launched_kernels(target), "a kernel without a case in launch_cases.cases"
    assert [one for one in made if one.shared > TARGETS[target][1]] == []
    early = [one for one in made if one.early and one.kernel not in HINTING]
    assert early == [], "memory is touched before the kernel in front has ended"
    assert [one for one in made if one.early_writes] == []


def test_registers_suffice_on_hopper_but_where_spilling_was_measured_to_pay(
    found: dict[str, Future[list[Compiled]]],
) -> None:
    made = found["sm_90"].result()
    strange = ("float32", "fnuz")  # whose products or conversions Hopper has not
    decode = [one for one in made if one.chained and not any(kind in one.case for kind in strange)]
    assert len(decode) > 50
    assert [one for one in decode if one.spilled] == []
    assert [one for one in made if one.spilled > _SPILLS.get(one.kernel, 0)] == []
