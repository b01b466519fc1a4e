"""What launches take from the device."""

import pytest
from pdkv_kernels.hardware import Hardware
from pdkv_kernels.launch import stages_that_fit


@pytest.mark.parametrize(("shared_bytes", "stages"), [(232_448, 4), (101_376, 3), (65_536, 2), (16_384, 1)])
def test_a_loop_has_as_many_stages_as_shared_memory_holds(
    shared_bytes: int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdkv_kernels.launch.hardware", lambda: Hardware(0, False, shared_bytes))
    assert stages_that_fit(4, 32_768, 8_192) == stages
