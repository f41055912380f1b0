"""DSCT in JAX: single-stage, context-aware emotion recognition.

model = dsct_jax.load(path)                    # run directory, .safetensors, or a released .pth with its configuration
out = model(images, padding_mask)              # out.logits [layers b q k+1], out.boxes [layers b q 4]; the last layer is the answer
dsct_jax.predict(model, photographs)           # a list of Subject(box, scores, labels) for each photograph
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsct_jax.errors import UserError
    from dsct_jax.load import Model, load
    from dsct_jax.subjects import Subject, predict

__all__ = ["Model", "Subject", "UserError", "load", "predict"]
__version__ = "0.1.0"


class _Public:
    """A name of this package that is imported on first use: the data workers need `dsct_jax.preprocess` and nothing of the model.

    A module-level `__getattr__` would do but for `load` and `predict`, which are modules too: importing one puts it in the function's place.
    """

    def __init__(self, home: str):
        self._home = f"{__name__}.{home}"

    def __set_name__(self, _: type, name: str) -> None:
        self._name = name

    def __get__(self, package: types.ModuleType, _: type | None = None) -> Any:
        return getattr(importlib.import_module(self._home), self._name)

    def __set__(self, package: types.ModuleType, value: Any) -> None:
        if not isinstance(value, types.ModuleType):
            raise AttributeError(f"{__name__}.{self._name} cannot be set")


class _Package(types.ModuleType):
    Model = _Public("load")
    Subject = _Public("subjects")
    UserError = _Public("errors")
    load = _Public("load")
    predict = _Public("subjects")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
