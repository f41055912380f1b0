"""Configurations: read from files, and turned into the frozen dataclasses of their sections."""

import dataclasses
import difflib
import json
import math
import os
import runpy
import traceback
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, TypeVar

from dsct_jax.errors import UserError, missing_extra

T = TypeVar("T")
Number = int | float

# what commands and library do unless told otherwise
BATCH_SIZE = 4  # images per call in prediction
MAX_MEGAPIXELS = 179.0  # of an image file, as in PIL: 13,000 x 13,000 takes half a GB
NMS_IOU = 0.5  # of two boxes that overlap more, the less confident one is dropped
RESAMPLES = 400  # of the images, for intervals: a few seconds for 10,000 of them

FACES = "faces"  # of --boxes, besides a file
BOXES = f"who the people are: a run that finds them, a json of boxes, or {FACES} (OpenCV)"
PRESETS = Path(__file__).with_name("presets")
_COMPARE = {"at least": ge, "at most": le, "more than": gt, "less than": lt}
_START = "start from configs/base.py"
# what a configuration file may raise that fails for a reason of its own
_FILE_ERRORS = (ArithmeticError, AttributeError, ImportError, LookupError, NameError, OSError)
_CONFIG_ERRORS = (*_FILE_ERRORS, SyntaxError, TypeError, ValueError)


def expanded_path(text: str | os.PathLike[str]) -> Path:
    """The path of a flag or a field, with ~ and $VARIABLES, which shells leave in --flag=~/x."""
    return Path(os.path.expandvars(text)).expanduser()


def setting(
    default: Any = dataclasses.MISSING,
    doc: str = "",
    *,
    choices: Iterable[str] = (),
    low: Number | None = None,
    high: Number | None = None,
    above: Number | None = None,
    below: Number | None = None,
    finite: bool = True,
    free: bool = False,
    shared: bool = False,
) -> Any:
    """A field of a section: its default, its meaning and what `check_settings` asks of it.

    Args:
        choices: the texts it may be; of a list, each of them once.
        low, high, above, below: bounds of the number, or of each number of a list.
        finite: False lets a number be infinite.
        free: two networks that differ in nothing else compute the same from the same weights.
        shared: it belongs to the configuration's top level and is no key of the section.
    """
    rules = {"choices": tuple(choices), "finite": finite, "free": free, "shared": shared}
    bounds = {"at least": low, "at most": high, "more than": above, "less than": below}
    return dataclasses.field(default=default, metadata={"doc": doc, "bounds": bounds, **rules})


def check_settings(section: Any, name: str) -> None:
    """Raises UserError at the first `setting` of a section that breaks a rule of its own."""
    for field in dataclasses.fields(section):
        value, rules = getattr(section, field.name), field.metadata
        if rules["choices"]:
            wanted = f"one of {', '.join(rules['choices'])}"
            given = value if isinstance(value, tuple) else (value,)
            fits = set(given) <= set(rules["choices"]) and len(set(given)) == len(given)
        else:
            numbers = _numbers(value)
            bounds = {text: limit for text, limit in rules["bounds"].items() if limit is not None}
            finite = not rules["finite"] or not any(map(math.isinf, numbers))
            wanted = " and ".join(f"{text} {limit:g}" for text, limit in bounds.items())
            wanted += "" if finite else " and finite" if wanted else "finite"
            fits = finite and all(
                _COMPARE[text](n, limit) for text, limit in bounds.items() for n in numbers
            )
        if not fits:
            raise cannot_be_used(f"{name}.{field.name}", value, wanted)


def cannot_be_used(field: str, value: Any, wanted: str) -> UserError:
    """The error for a value of `config.FIELD`; `wanted` says what it must be."""
    return UserError(f"config.{field}={value!r} cannot be used: must be {wanted}")


def _numbers(value: Any) -> list[Number]:
    if isinstance(value, list | tuple):
        return [number for entry in value for number in _numbers(entry)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def defaults(section: type) -> dict[str, Any]:
    """The section as a configuration file writes it, every field at its default."""
    return {f.name: f.default for f in _own_fields(section)}


def free_fields(section: type) -> tuple[str, ...]:
    """The fields that say how the same network is computed."""
    return tuple(field.name for field in _own_fields(section) if field.metadata.get("free"))


def _own_fields(section: Any) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(section) if not f.metadata.get("shared")]


def to_builtins(value: Any) -> Any:
    """A section, a mapping of any kind, tuples and lists -> dict and tuple all the way down."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_builtins(getattr(value, f.name)) for f in _own_fields(value)}
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {key: to_builtins(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return tuple(to_builtins(entry) for entry in value)
    return value


def presets() -> tuple[str, ...]:
    """Names of the configurations that ship with the package: those of the released weights."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.json")))


def read_config(source: Path | str | Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as plain values: of a file with `get_config()`, of a run's config.json, of a
    preset's name (a file of that name wins), or of a mapping.

    Raises:
        UserError: the file is missing, fails, or gives no mapping; the line names it.
    """
    if isinstance(source, Mapping):
        return to_builtins(source)
    path = expanded_path(source)
    if not path.exists() and str(source) in presets():
        path = PRESETS / f"{source}.json"
    if not path.is_file():
        raise UserError(f"--config={source}: no such file; the presets are {', '.join(presets())}")
    if path.suffix not in (".py", ".json"):
        raise UserError(f"--config={path}: neither a .py nor a .json file")
    try:
        if path.suffix == ".json":
            config = json.loads(path.read_text(encoding="utf-8"))
        else:
            config = runpy.run_path(str(path))["get_config"]()
        config = to_builtins(config)
    except _CONFIG_ERRORS as error:
        if isinstance(error, ImportError) and (line := missing_extra(error)):
            raise line from error
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        absent = str(error) == "'get_config'"
        reason = "has no get_config()" if absent else f"{type(error).__name__}: {error}"
        raise UserError(f"--config={where}: {' '.join(reason.split())}") from error
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise UserError(f"--config={path}: gives no mapping but {kind}; {_START}")
    return config


def require(config: Mapping[str, Any], name: str, kind: type) -> Any:
    """Entry `name` of a configuration's top level. Raises UserError: missing, or no `kind`."""
    found = config.get(name)
    if not isinstance(found, kind):
        wrong = "missing" if found is None else f"{found!r} cannot be used"
        raise UserError(f"config.{name}: {wrong}; {_START}")
    return found


def dataclass_from_dict(cls: type[T], name: str, values: Mapping[str, Any], **extra: Any) -> T:
    """`cls(**values, **extra)` of a dataclass `cls`, the section `name` ("" = the top level).

    Raises:
        UserError: a key that `cls` does not have (with the closest field), a field without a value,
            or a value of another type than the field's.
    """
    prefix = f"config.{name}." if name else "config."
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    own = [field for field in fields if field not in extra]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in own:
            raise unknown_field(prefix, key, own)
    given = {key: to_builtins(value) for key, value in values.items()}
    for key in own:
        missing = fields[key].default is fields[key].default_factory is dataclasses.MISSING
        if missing and key not in given:
            raise UserError(f"{prefix}{key}: missing; {_START}")
    for key, value in given.items():
        if not _fits(value, hints[key]):
            field = f"{name}.{key}" if name else key
            raise cannot_be_used(field, value, _describe(hints[key]))
        if hints[key] is float:  # written as 3 it means 3.0
            given[key] = float(value)
    return cls(**given, **extra)


def unknown_field(prefix: str, key: str, known: Iterable[str]) -> UserError:
    """The error for a field `prefix` + `key` that is none of `known`."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {prefix}{close[0]}?" if close else f"there are {', '.join(known)}"
    return UserError(f"{prefix}{key}: unknown field; {hint}")


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], *, prefix: str = ""
) -> list[str]:
    """`field: old -> new` for every field that both configurations have with different values."""
    found: list[str] = []
    for key in before.keys() & after.keys():
        old, new, name = to_builtins(before[key]), to_builtins(after[key]), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, prefix=f"{name}.")
        elif old != new:
            found.append(f"{name}: {old!r} -> {new!r}")
    return sorted(found)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Sequence or (origin is tuple and inner[-1] is Ellipsis):
        return isinstance(value, tuple) and all(_fits(entry, inner[0]) for entry in value)
    if origin is tuple:
        tuples = isinstance(value, tuple) and len(value) == len(inner)
        return tuples and all(map(_fits, value, inner))
    if hint in (int, float):
        kinds = (int, float) if hint is float else int
        return isinstance(value, kinds) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def _describe(hint: Any) -> str:
    """A type in words: 'a list of (a list of whole numbers)'."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, inner))
    if origin is Sequence or (origin is tuple and inner[-1] is Ellipsis):
        return f"a list, each entry {_describe(inner[0])}"
    if origin is tuple:
        return f"({', '.join(map(_describe, inner))})"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
    return words.get(hint, str(hint))
