"""Which libucp to load: the one asked for, else a system UCX that has InfiniBand, else the libucx wheel.

One that cannot carry GPU memory is none where that is to be carried.
"""

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from pdkv.errors import TransportError

LIBRARY = "libucp.so.0"

SYSTEM_DIRECTORIES = (
    "/opt/hpcx/ucx/lib",
    "/opt/mellanox/ucx/lib",
    "/opt/ucx/lib",
    "/usr/local/ucx/lib",
    "/usr/local/lib",
    "/usr/lib64",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib",
)
"""Where HPC-X, DOCA-OFED, containers and distributions put UCX; the vendors' first, because they are newer."""

HOW_TO_INSTALL = (
    "install the wheel with `pip install libucx-cu12` (TCP and shared memory), or the system's UCX (InfiniBand, RoCE), "
    "or name a libucp.so.0 with PDKV_UCX_LIBRARY"
)


class UcxLibrary(msgspec.Struct, frozen=True):
    """One libucp and why it was chosen."""

    path: str
    has_infiniband: bool
    """Its module directory holds ``libuct_ib``; whether a device is there is another matter."""
    source: str
    """ "explicit", "system" or "wheel"."""
    has_cuda: bool = False
    """Likewise ``libuct_cuda``: it can register and read the memory of NVIDIA GPUs."""
    version: str = ""
    """As the loaded library says; empty before it is loaded."""


def find_ucx_library(
    explicit: str | None = None,
    *,
    cuda: bool = False,
    system_directories: Iterable[str] = SYSTEM_DIRECTORIES,
    wheel: str = "libucx",
) -> UcxLibrary:
    """The library to load. ``explicit`` is a libucp file or the directory that holds it; ``wheel`` is the name of the
    Python package that bundles UCX; ``cuda``: it is to carry GPU memory, and those that cannot are passed over, but for
    an explicit one. Raises ``TransportError`` saying what to install when there is none."""
    if explicit is not None:
        return _explicit(explicit)
    bundled = list(_in_wheel(wheel))
    system = [place / LIBRARY for place in map(Path, system_directories) if (place / LIBRARY).is_file()]
    found = [_described(path, "system") for path in system]
    fit = [library for library in found if library.has_infiniband]
    fit += [_described(path, "wheel") for path in bundled]
    fit += [library for library in found if not library.has_infiniband]
    for library in fit:
        if library.has_cuda or not cuda:
            return library
    if fit:
        raise TransportError(
            f"no UCX found that carries GPU memory (looked at {', '.join(library.path for library in fit)}): install "
            "libucx-cu12 or libucx-cu13, whichever fits the driver, or a system UCX with CUDA"
        )
    raise TransportError(f"no UCX found: {HOW_TO_INSTALL}")


def has_infiniband(library: Path) -> bool:
    """Whether the UCX that ``library`` belongs to was built with InfiniBand and RoCE."""
    return _has_module(library, "libuct_ib")


def has_cuda(library: Path) -> bool:
    """Whether the UCX that ``library`` belongs to was built with CUDA."""
    return _has_module(library, "libuct_cuda")


def _has_module(library: Path, name: str) -> bool:
    return any(any(place.glob(f"ucx/{name}*.so*")) for place in (library.resolve().parent, library.parent))


def _described(path: Path, source: str) -> UcxLibrary:
    return UcxLibrary(path=str(path), has_infiniband=has_infiniband(path), source=source, has_cuda=has_cuda(path))


def _explicit(named: str) -> UcxLibrary:
    path = Path(named)
    if path.is_dir():
        path = path / LIBRARY
    if not path.is_file():
        raise TransportError(f"the UCX library asked for, {named}, is no file: {HOW_TO_INSTALL}")
    return _described(path.absolute(), "explicit")


def _in_wheel(package: str) -> Iterator[Path]:
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / "lib" / LIBRARY
        if path.is_file():
            yield path
