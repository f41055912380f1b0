"""Configurations: read from files, and turned into the frozen dataclasses that the library takes;
what does not fit is an error naming the field.
"""

import dataclasses
import difflib
import json
import math
import runpy
import traceback
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, TypeVar

from dsct_jax.errors import UserError

T = TypeVar("T")
Number = int | float

PRESETS = Path(__file__).with_name("presets")
_COMPARE = {"at least": ge, "at most": le, "more than": gt, "less than": lt}
# what a configuration file may raise that fails for a reason of its own
_CONFIG_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
)


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
        choices: the texts it may be.
        low, high, above, below: bounds of the number, or of each number of a list.
        finite: False lets a number be infinite.
        free: two networks that differ in nothing else compute the same from the same weights.
        shared: it belongs to the configuration's top level and is no key of the section.
    """
    rules = {"choices": tuple(choices), "finite": finite, "free": free, "shared": shared}
    bounds = {"at least": low, "at most": high, "more than": above, "less than": below}
    return dataclasses.field(default=default, metadata={"doc": doc, "bounds": bounds, **rules})


def check_settings(section: Any, name: str) -> None:
    """Raises UserError at the first field of a section (a dataclass made of `setting`s) that breaks
    a rule of its own.
    """
    for field in dataclasses.fields(section):
        value, rules = getattr(section, field.name), field.metadata
        if rules["choices"]:
            wanted, fits = f"one of {', '.join(rules['choices'])}", value in rules["choices"]
        else:
            numbers = _numbers(value)
            bounds = {text: limit for text, limit in rules["bounds"].items() if limit is not None}
            finite = not rules["finite"] or not any(map(math.isinf, numbers))
            wanted = " and ".join(f"{text} {limit:g}" for text, limit in bounds.items())
            wanted += "" if finite else " and finite" if wanted else "finite"
            fits = finite and all(
                _COMPARE[text](number, limit)
                for text, limit in bounds.items()
                for number in numbers
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


CLASS_LOSSES = ("focal", "softmax")
FOCAL_NORMALIZATIONS = ("released", "paper")
MATCHERS = ("scipy", "device")
SCHEDULES = ("step", "cosine")
ShardRules = Sequence[tuple[str, str]]
# (regex over whole paths such as "opt_state/.*", axis of the mesh); the first that matches
# counts
FSDP: ShardRules = ((r"(params|ema|opt_state)/.*", "data"),)


@dataclasses.dataclass(frozen=True)
class MatcherConfig:
    """Weights of the three costs (the paper's theta; the released code's set_cost_*), and where the
    assignment is solved.
    """

    cost_class: float = 2.0
    cost_bbox: float = 5.0  # L1
    cost_giou: float = 2.0
    implementation: str = "scipy"

    def __post_init__(self) -> None:
        if self.implementation not in MATCHERS:
            raise UserError(
                f"matcher.implementation={self.implementation!r} is not one of "
                f"{', '.join(MATCHERS)}"
            )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and forms of the loss terms; meaning and source of each in configs/base.py."""

    weight_class: float = 5.0
    weight_bbox: float = 5.0
    weight_giou: float = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    focal_normalization: str = "released"
    class_weights: tuple[float, ...] = ()
    class_loss: str = "focal"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "class_weights", tuple(self.class_weights)
        )  # hashable, so that the configuration can be a static argument
        if self.class_loss not in CLASS_LOSSES:
            raise UserError(
                f"loss.class_loss={self.class_loss!r} is not one of {', '.join(CLASS_LOSSES)}"
            )
        if self.focal_normalization not in FOCAL_NORMALIZATIONS:
            raise UserError(
                f"loss.focal_normalization={self.focal_normalization!r} is not one of "
                f"{', '.join(FOCAL_NORMALIZATIONS)}"
            )
        if not (
            0 <= self.focal_alpha <= 1 and self.focal_gamma >= 0 and 0 <= self.label_smoothing < 1
        ):
            raise UserError(
                f"loss: focal_alpha={self.focal_alpha} must lie in [0, 1], "
                f"focal_gamma={self.focal_gamma} be at least 0, "
                f"label_smoothing={self.label_smoothing} lie in [0, 1)"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and the rules over parameter paths; meaning and source of each field in
    configs/base.py.
    """

    learning_rate: float = 2e-4
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    schedule: str = "step"
    drop_at: float = 0.8
    warmup_steps: int = 0
    rules: Sequence[tuple[str, float]] = ((".*", 1.0),)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"optimizer.schedule={self.schedule!r} is not one of {', '.join(SCHEDULES)}"
            )
        if (
            self.learning_rate <= 0
            or self.weight_decay < 0
            or self.clip_norm <= 0
            or self.warmup_steps < 0
        ):
            raise UserError(
                f"optimizer: learning_rate={self.learning_rate} and clip_norm={self.clip_norm} "
                "must be positive, "
                f"weight_decay={self.weight_decay} and warmup_steps={self.warmup_steps} not "
                "negative (clip_norm=float('inf') does not clip)"
            )


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step is carried out; configs/base.py explains each field (section train)."""

    accumulate: int = 1
    ema_decay: float = 0.0
    skip_nonfinite: bool = True
    shard_rules: ShardRules = ()
    shard_min_size: int = 2**14

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise UserError(f"accumulate={self.accumulate} cannot be used: must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise UserError(
                f"ema_decay={self.ema_decay} cannot be used: must lie in [0, 1), 0 = off"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The `train` section of a configuration; configs/base.py explains each field."""

    batch_size: int
    eval_batch_size: int
    epochs: float
    steps: int
    eval_every: float
    checkpoint_every: float
    keep_checkpoints: int
    log_every: int
    accumulate: int = 1
    ema_decay: float = 0.0
    fsdp: bool = False
    max_skipped: int = 20
    best_metric: str = ""
    early_stopping: int = 0
    wandb: str = ""

    def __post_init__(self) -> None:
        for field in (
            "batch_size",
            "eval_batch_size",
            "keep_checkpoints",
            "log_every",
            "accumulate",
        ):
            if getattr(self, field) < 1:
                raise UserError(
                    f"config.train.{field}={getattr(self, field)} cannot be used: must be at "
                    "least 1"
                )
        for field in ("epochs", "eval_every", "checkpoint_every"):
            if not 0 < getattr(self, field) < float("inf"):
                raise UserError(
                    f"config.train.{field}={getattr(self, field)} cannot be used: must be more "
                    "than 0"
                )
        if self.steps < 0:
            raise UserError(
                f"config.train.steps={self.steps} cannot be used: must be 0 (as many as "
                "config.train.epochs say) or more"
            )
        for field in ("max_skipped", "early_stopping"):
            if getattr(self, field) < 0:
                raise UserError(
                    f"config.train.{field}={getattr(self, field)} cannot be used: must be 0 or more"
                )
        if not 0 <= self.ema_decay < 1:
            raise UserError(
                f"config.train.ema_decay={self.ema_decay} cannot be used: must be at least 0 "
                "(off) and less than 1"
            )

    @property
    def step_config(self) -> StepConfig:
        """The part that a step needs to know."""
        return StepConfig(
            accumulate=self.accumulate,
            ema_decay=self.ema_decay,
            shard_rules=FSDP if self.fsdp else (),
        )

    def require_divisible(self, devices: int) -> None:
        """Raises UserError unless the global batch sizes divide by the number of devices."""
        if self.batch_size % (devices * self.accumulate) and self.accumulate > 1:
            parts = f"{devices} devices x config.train.accumulate={self.accumulate}"
            raise UserError(
                f"config.train.batch_size={self.batch_size} cannot be shared by {parts}: set it "
                "to a multiple of their product"
            )
        for field in ("batch_size", "eval_batch_size"):
            if getattr(self, field) % devices:
                raise UserError(
                    f"config.train.{field}={getattr(self, field)} cannot be shared by {devices} "
                    f"devices: set it to a multiple of {devices}"
                )


def to_builtins(value: Any) -> Any:
    """A section, a mapping of any kind, tuples and lists -> dict and tuple all the way down, as a
    configuration file and JSON have them.
    """
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
    """A configuration as plain values: of a file with `get_config()`, such as configs/demo.py, of a
    run's config.json, of a preset's name, or of a mapping. A file wins over a preset of its name.

    Raises:
        UserError: the file is missing, fails, or gives no mapping; the line names it.
    """
    if isinstance(source, Mapping):
        return to_builtins(source)
    path = Path(source)
    if not path.exists() and str(source) in presets():
        path = PRESETS / f"{source}.json"
    if not path.is_file():
        raise UserError(f"--config={source}: no such file; the presets are {', '.join(presets())}")
    if path.suffix not in (".py", ".json"):
        raise UserError(f"--config={path}: neither a .py nor a .json file")
    try:
        if path.suffix == ".json":
            config = to_builtins(json.loads(path.read_text()))
        else:
            config = to_builtins(runpy.run_path(str(path))["get_config"]())
    except _CONFIG_ERRORS as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        reason = f"{type(error).__name__}: {error}"
        if str(error) == "'get_config'":
            reason = "has no get_config()"
        raise UserError(f"--config={where}: {' '.join(reason.split())}") from error
    if not isinstance(config, dict):
        raise UserError(
            f"--config={path}: gives no mapping but {type(config).__name__}; start from "
            "configs/base.py"
        )
    return config


def require(config: Mapping[str, Any], name: str, kind: type) -> Any:
    """The section or field `name` of a configuration's top level; raises UserError where it is
    missing or no `kind`.
    """
    found = config.get(name)
    if not isinstance(found, kind):
        raise UserError(
            f"config.{name}: "
            + ("missing" if found is None else f"{found!r} cannot be used")
            + "; start from configs/base.py"
        )
    return found


def dataclass_from_dict(cls: type[T], name: str, values: Mapping[str, Any], **extra: Any) -> T:
    """`cls(**values, **extra)`, `cls` being a dataclass and `name` the section ("" = the top
    level).

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
    for key, field in fields.items():
        if (
            key not in given
            and key not in extra
            and field.default is field.default_factory is dataclasses.MISSING
        ):
            raise UserError(f"{prefix}{key}: missing; start from configs/base.py")
    for key, value in given.items():
        if not _fits(value, hints[key]):
            raise UserError(
                f"{prefix}{key}={value!r} cannot be used: must be {_describe(hints[key])}"
            )
        if hints[key] is float:  # written as 3 it means 3.0
            given[key] = float(value)
    return cls(**given, **extra)


def unknown_field(prefix: str, key: str, known: Iterable[str]) -> UserError:
    """The error for a field `prefix` + `key` that is none of `known`."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    return UserError(
        f"{prefix}{key}: unknown field; "
        + (f"did you mean {prefix}{close[0]}?" if close else f"there are {', '.join(known)}")
    )


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
        return (
            isinstance(value, tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
        )
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(
            value, bool
        )
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
    return {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}.get(
        hint, str(hint)
    )
