"""Every kernel compiles for a Hopper as it is launched there; the interpreter would not know. No GPU is needed.

Other devices and all of production's shapes: tests/long/test_compiles.py.
"""

import pytest

from tests.kernels.compiled import HINTING, TARGETS, compiled, launched_kernels


@pytest.mark.timeout(900)  # a minute of a quiet machine
def test_every_kernel_compiles_fits_and_waits_its_turn() -> None:
    found = compiled("sm_90", "--brief")
    assert [one for one in found if one.error] == []
    assert {one.kernel for one in found} == launched_kernels("sm_90"), "a kernel without a case in launch_cases.BRIEF"
    assert [one for one in found if one.shared > TARGETS["sm_90"][1]] == []
    early = [one for one in found if one.early and one.kernel not in HINTING]
    assert early == [], "memory is touched before the kernel in front has ended"
    assert [one for one in found if one.early_writes] == []
    assert {one.kernel for one in found if one.chained} >= {
        "kv_store._kv_store",
        "index_topk_prefill._score_blocks",
        "index_topk_prefill._select_blocks",
        "index_choice._choose_kernel",
        "index_ring._ring_kernel",
        "index_scan._scan_kernel",
        "index_selection._select_kernel",
        "attend_ring._attend_kernel",
        "sparse_attention_decode._attend_kernel",
        "paged_attention_decode._attend_kernel",
        "softmax_merge._merge_kernel",
    }
