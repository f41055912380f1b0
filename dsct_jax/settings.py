"""From a configuration's sections (plain mappings) to the frozen dataclasses that the library takes: an unknown key is an error."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from dsct_jax.errors import UserError

T = TypeVar("T")


def plain(value: Any) -> Any:
    """A mapping of any kind, tuples and lists -> dict and tuple all the way down, as dataclasses and JSON want them."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return tuple(plain(entry) for entry in value)
    return value


def from_section(cls: type[T], name: str, values: Mapping[str, Any], **extra: Any) -> T:
    """`cls(**values, **extra)`; a key that `cls` does not have raises UserError with the section `name` and the closest field."""
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            raise UserError(
                f"config.{name}.{key}: unknown field" + (f"; did you mean {name}.{close[0]}?" if close else f"; {name} has {', '.join(fields)}")
            )
    return cls(**{key: plain(value) for key, value in values.items()}, **extra)
