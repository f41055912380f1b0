"""The data tools: `python -m data COMMAND ...`, from a checkout."""

import sys

from dsct_jax.cli import run_subcommand

COMMANDS = {
    "check": "counts, labels, damaged files and images that stand in two splits",
    "show": "a sheet of raw and augmented samples",
    "split": "train, val and test files from one annotation file, grouped by image content",
    "prepare": "images resized once and packed into a few large files",
    "build_ncaer_s": "NCAER-S from the CAER videos",
    "samples": "images of the built-in scenes, with their annotations",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    return run_subcommand("data.tools", COMMANDS, argv, prog="python -m data")


if __name__ == "__main__":
    sys.exit(main())
