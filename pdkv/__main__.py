"""Entry point of the ``pdkv`` command: says what to install when the command line's own libraries are missing."""

import sys


def main() -> None:
    """Run the command line; exits with the code of the command."""
    try:
        from pdkv.cli import app  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.startswith("pdkv"):
            raise
        sys.exit(f"pdkv: the command line needs the package {exc.name!r}; install it with: pip install 'pdkv[all]'")
    app(prog_name="pdkv")


if __name__ == "__main__":
    main()
