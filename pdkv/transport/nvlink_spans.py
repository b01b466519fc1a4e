"""The native half of nvlink, which looks at, cuts and launches a batch's spans."""

from pdkv.errors import TransportError

try:
    from pdkv.transport._spans import Bounds, Driver, Ends, Posting, Watch

    _EXTENSION_ERROR: ImportError | None = None
except ImportError as missing:
    _EXTENSION_ERROR = missing

__all__ = ["Bounds", "Driver", "Ends", "Posting", "Watch", "check_extension"]


def check_extension() -> None:
    """Raises ``TransportError`` when the native half of this module is not there."""
    if _EXTENSION_ERROR is not None:
        raise TransportError(
            f"pdkv's native readers are not built ({_EXTENSION_ERROR}): install pdkv with pip, "
            "or run `python setup.py build_ext --inplace` in a checkout"
        ) from _EXTENSION_ERROR
