"""Entry point of the ``pdkv`` command: says what to install when the command line's own libraries are missing."""

import gc
import os
import sys


def main() -> None:
    """Run the command line; exits with the code of the command."""
    # Before torch is loaded, here or in a child: its threads would spin while they wait, and beside other workers on
    # the same cores that made a prefill ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    gc.set_threshold(50_000, 20, 20)  # Python's 700 make loading a daemon's modules a tenth slower
    try:
        from pdkv.cli import app  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.startswith("pdkv"):
            raise
        sys.exit(f"pdkv: the command line needs the package {exc.name!r}; install it with: pip install 'pdkv[all]'")
    app(prog_name="pdkv")


if __name__ == "__main__":
    main()
