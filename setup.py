"""Builds the native extensions for the stable ABI: UCX's headers are needed, its library not until run time."""

import importlib.util
import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

NATIVE = "pdkv/transport/native"

STABLE_ABI = "0x030B0000"
"""One wheel for Python 3.11 and later: the extensions use nothing that is not in 3.11's stable ABI."""


def ucx_headers() -> str:
    """The directory that holds ``ucp/api/ucp.h``: PDKV_UCX_INCLUDE, else the libucx wheel's."""
    if chosen := os.environ.get("PDKV_UCX_INCLUDE"):
        candidates = [Path(chosen)]
    else:
        wheel = importlib.util.find_spec("libucx")
        candidates = [Path(place) / "include" for place in (wheel.submodule_search_locations or [] if wheel else [])]
    for candidate in candidates:
        if (candidate / "ucp/api/ucp.h").is_file():
            return str(candidate)
    raise SystemExit(
        f"pdkv: no UCX headers (ucp/api/ucp.h) in {[str(c) for c in candidates]}; "
        "run `pip install libucx-cu12`, or set PDKV_UCX_INCLUDE to the include directory of an installed UCX"
    )


def extension(name: str, sources: tuple[str, ...], headers: tuple[str, ...], *flags: str) -> Extension:
    return Extension(
        f"pdkv.transport.{name}",
        sources=[f"pdkv/transport/{name}.pyx", *(f"{NATIVE}/{source}.c" for source in ("reads", *sources))],
        depends=["pdkv/transport/_reads.pxi", *(f"{NATIVE}/{header}.h" for header in ("reads", *headers))],
        libraries=["dl", "pthread"],  # stubs since glibc 2.34
        define_macros=[("Py_LIMITED_API", STABLE_ABI)],
        py_limited_api=True,
        extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", *flags],
    )


setup(
    ext_modules=cythonize(
        [
            extension(
                "_ucp",
                ("ucx_api", "ucx_engine", "ucx_thread", "ucx_peer"),
                ("ucx_api", "ucx_engine", "ucx_internal"),
                "-isystem",
                ucx_headers(),
            ),
            extension(
                "_pull",
                (
                    *("pull_engine", "pull_copy", "pull_mapped", "pull_socket", "pull_host"),
                    *("pull_stage", "pull_cuda", "pull_emulated", "pull_landing", "pull_outbox"),
                ),
                ("pull", "pull_device", "pull_host", "pull_internal", "pull_landing", "pull_outbox", "pull_wire"),
            ),
            extension(
                "_spans",
                ("spans", "nvlink_posting", "nvlink_watch"),
                ("spans", "nvlink_posting", "nvlink_watch"),
                "-O3",
            ),
        ],
        language_level=3,
    ),
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
