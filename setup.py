"""Builds the UCX binding for the stable ABI: needs UCX's headers at build time, and no UCX library until run time."""

import importlib.util
import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

NATIVE = "pdkv/transport/native"

STABLE_ABI = "0x030B0000"
"""One wheel for Python 3.11 and later: the binding uses nothing that is not in 3.11's stable ABI."""


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


setup(
    ext_modules=cythonize(
        [
            Extension(
                "pdkv.transport._ucp",
                sources=["pdkv/transport/_ucp.pyx"]
                + [f"{NATIVE}/{name}.c" for name in ("ucx_api", "ucx_engine", "ucx_thread", "ucx_peer")],
                depends=[f"{NATIVE}/{name}.h" for name in ("ucx_api", "ucx_engine", "ucx_internal")],
                libraries=["dl", "pthread"],  # stubs since glibc 2.34
                define_macros=[("Py_LIMITED_API", STABLE_ABI)],
                py_limited_api=True,
                extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-isystem", ucx_headers()],
            )
        ],
        language_level=3,
    ),
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
