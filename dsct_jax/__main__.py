"""The library's commands: `python -m dsct_jax COMMAND ...`, installed as `dsct COMMAND ...`."""

import sys
from collections.abc import Sequence

from dsct_jax.cli import run_subcommand


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (None: of this process's command line); returns its exit status."""
    return run_subcommand("dsct_jax.commands", argv, prog="python -m dsct_jax")


if __name__ == "__main__":
    sys.exit(main())
