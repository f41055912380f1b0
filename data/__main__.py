"""The data tools: `python -m data COMMAND ...`, from a checkout."""

import sys
from collections.abc import Sequence

from dsct_jax.cli import run_subcommand

COMMANDS = {
    "import": "another tool's export as a data set, and a configuration for it",
    "check": "counts, labels, damaged files and images that are in two splits",
    "show": "a sheet of raw and augmented samples",
    "samples": "the first images of a split as files, with their annotations",
    "split": "train, val and test files from one annotation file, grouped by image content",
    "prepare": "images resized once and packed into a few large files",
    "build_ncaer_s": "NCAER-S from the CAER videos",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (None: of this process's command line); returns its exit status."""
    return run_subcommand("data.tools", COMMANDS, argv, prog="python -m data")


if __name__ == "__main__":
    sys.exit(main())
