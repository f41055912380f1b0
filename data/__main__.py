"""The data tools: `python -m data COMMAND ...`, from a checkout."""

import sys
from collections.abc import Sequence

from dsct_jax.cli import run_subcommand


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (None: of this process's command line); returns its exit status."""
    return run_subcommand("data.tools", argv, prog="python -m data")


if __name__ == "__main__":
    sys.exit(main())
