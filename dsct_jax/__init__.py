"""DSCT in JAX: single-stage, context-aware emotion recognition.

model = dsct_jax.load(path)                    # run directory, .safetensors, or a released .pth with its configuration
out = model(images, padding_mask)              # out.logits [layers b q k+1], out.boxes [layers b q 4]; the last layer is the answer
dsct_jax.predict(model, photographs)           # a list of Subject(box, scores, labels) for each photograph
"""

from dsct_jax.errors import UserError
from dsct_jax.load import Model, load
from dsct_jax.subjects import Subject, predict

__all__ = ["Model", "Subject", "UserError", "load", "predict"]
__version__ = "0.1.0"
