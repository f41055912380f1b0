"""DSCT in JAX: single-stage, context-aware emotion recognition.

model = dsct_jax.load(path)        # a run, .safetensors, or .pth with its configuration
out = model(images, padding_mask)  # out.logits [layers b q k+1], out.boxes [layers b q 4]
dsct_jax.predict(model, images)    # a list of Subject(box, probabilities, labels) per image
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsct_jax.errors import UserError
    from dsct_jax.inference.load import Model, load
    from dsct_jax.inference.predict import Subject, predict

__all__ = ["Model", "Subject", "UserError", "load", "predict"]
__version__ = "0.1.0"

# Imported on first use: data workers need `dsct_jax.preprocess` and nothing of the model.
_HOMES = {
    "Model": "dsct_jax.inference.load",
    "Subject": "dsct_jax.inference.predict",
    "UserError": "dsct_jax.errors",
    "load": "dsct_jax.inference.load",
    "predict": "dsct_jax.inference.predict",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
