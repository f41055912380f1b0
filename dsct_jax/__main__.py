"""The library's commands: `python -m dsct_jax COMMAND ...`, installed as `dsct COMMAND ...`."""

import sys
from collections.abc import Sequence

from dsct_jax.cli import run_subcommand

COMMANDS = {
    "predict": "people and their emotions in images, folders, videos or a camera",
    "evaluate": "every metric of a predictions_<split>.npz, without a model",
    "report": "curves and tables of a run",
    "visualize": "the paper's figures, drawn from a checkpoint",
    "export": "a trained model as StableHLO, safetensors, .pth or ONNX",
    "convert": "third-party weights as a .safetensors file of this project",
    "model_card": "what others should know about a trained model, as Markdown",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (None: of this process's command line); returns its exit status."""
    return run_subcommand("dsct_jax.commands", COMMANDS, argv, prog="python -m dsct_jax")


if __name__ == "__main__":
    sys.exit(main())
