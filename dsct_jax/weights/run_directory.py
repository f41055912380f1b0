"""Reading what a run left below its workdir: the steps that were saved, and the weights of one.

A checkpoint has two parts of arrays, so that prediction reads only what it needs: `model`
(parameters and norm statistics) and `training` (optimizer, moving average, counters). `layout` says
what lies where in them (packing.py), `metadata` how they came about. training/checkpoint.py writes.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dsct_jax.batch import FlatParams
from dsct_jax.config import differences, free_fields
from dsct_jax.errors import UserError
from dsct_jax.weights.packing import Layout, part_of, unpack

DIRECTORY = "checkpoints"
PARTS = ("model", "training")
MODEL_FIELDS = ("class_names", "multi_label", "model")  # of a configuration: what the weights mean
# What orbax and tensorstore raise for files that were cut, emptied or removed, and for a full disk.
FILE_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
_log = logging.getLogger(__name__)


class DamagedCheckpoint(UserError):
    """A complete checkpoint whose files cannot be read; `reason` in a few words."""

    def __init__(self, path: Path, reason: str):
        remedy = "remove it to continue from the one before"
        super().__init__(f"{path}: this checkpoint is damaged ({reason}); {remedy}")
        self.reason = reason


class Weights(NamedTuple):
    """The weights of one checkpoint as numpy."""

    params: FlatParams
    norm_stats: FlatParams
    metadata: dict[str, Any]  # configuration, class names, progress, decoder, ...
    step: int  # of the checkpoint that was really read


def load_weights(workdir: Path, step: int | None = None, *, ema: bool = True) -> Weights:
    """The weights of the checkpoint of `step` (None: the newest that can be read) below `workdir`;
    `ema`: with the moving average of the trained parameters, where the run kept one.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    _require_run(workdir)
    folder, steps = workdir / DIRECTORY, complete_steps(workdir)
    if not steps:
        remedy = "train first, or wait until one is written"
        raise UserError(f"{folder}: holds no complete checkpoint; {remedy}")
    if step is not None:
        if step not in steps:
            there = ", ".join(map(str, steps))
            raise UserError(f"{folder}: holds no checkpoint of step {step}; there are {there}")
        return _weights_of(workdir, step, ema=ema)
    for newest in reversed(steps[1:]):
        try:
            return _weights_of(workdir, newest, ema=ema)
        except DamagedCheckpoint as error:
            text = "checkpoint %d is damaged (%s): the one before is taken"
            _log.warning(text, newest, error.reason)
    return _weights_of(workdir, steps[0], ema=ema)


def _weights_of(workdir: Path, step: int, *, ema: bool) -> Weights:
    path = (workdir / DIRECTORY / str(step)).absolute()
    with damage_reported(path):
        metadata, layout = read_metadata(path), read_layout(path)
        values = read_arrays(path / "model", layout["model"])
        averages = read_arrays(path / "training", layout["training"], only="ema") if ema else {}
    parts: dict[str, FlatParams] = {"params": {}, "frozen": {}, "ema": {}}
    for name, leaf in (values | averages).items():
        part, rest = name.split(".", 1)
        parts[part][rest.replace(".", "/")] = leaf
    frozen = parts["frozen"] | _modalities(metadata)
    return Weights(parts["params"] | parts["ema"], frozen, metadata, step)


def _modalities(metadata: Mapping[str, Any]) -> FlatParams:
    """The frozen networks that a checkpoint names by file."""
    stored = metadata.get("modalities")
    if not stored:
        return {}
    from dsct_jax.model.build import Network, network_config  # flax, which not every reader needs
    from dsct_jax.weights.modalities import load_modalities

    config = network_config(metadata["config"]["model"], len(metadata["class_names"]))
    return load_modalities(Network(config), seed=metadata["seed"], stored=stored).values


def complete_steps(workdir: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first: one being written has another name."""
    names = (path.name for path in (workdir / DIRECTORY).glob("*"))
    return sorted(int(name) for name in names if name.isdecimal())


def newest_step(workdir: Path) -> int | None:
    """Step of the newest complete checkpoint below `workdir`; None where there is none."""
    return max(complete_steps(workdir), default=None)


def best_step(workdir: Path) -> int:
    """Step of the checkpoint with the best validation so far, according to the newest one. Raises
    UserError where no validation was saved.
    """
    _require_run(workdir)
    newest, found = newest_step(workdir), None
    if newest is not None:
        path = workdir / DIRECTORY / str(newest)
        with damage_reported(path):
            found = read_metadata(path).get("progress", {}).get("best_step")
    if found is None:
        reason = "no checkpoint has a validation, so none is the best; take the newest"
        raise UserError(f"{workdir / DIRECTORY}: {reason}")
    return found


def parse_step(text: str, workdir: Path) -> int | None:
    """--checkpoint as the step of a checkpoint, None = the newest. Raises UserError."""
    if text in ("newest", "best"):
        return None if text == "newest" else best_step(workdir)
    if not text.isdecimal():
        wanted = "newest, best or the step of a checkpoint"
        raise UserError(f"--checkpoint={text} cannot be used: must be {wanted}")
    return int(text)


def parse_run_path(path: Path) -> tuple[Path, int | None]:
    """(workdir, step) of RUN, RUN/checkpoints (both: None, the newest) or RUN/checkpoints/STEP."""
    if path.parent.name == DIRECTORY and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path.parent if path.name == DIRECTORY else path, None


def _require_run(workdir: Path) -> None:
    if not (workdir / DIRECTORY).is_dir():
        raise UserError(f"{workdir}: no {DIRECTORY}/ here; give the --workdir of a training run")


def require_same_model(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raises UserError, naming the fields, when two configurations describe different models."""
    from dsct_jax.model.build import network_entry  # flax, which not every reader needs

    network = network_entry(wanted.get("model", {})).config
    free = [f"model.{field}" for field in free_fields(network)]
    keys = [key for key in MODEL_FIELDS if key in stored]
    lines = differences(*({key: config[key] for key in keys} for config in (stored, wanted)))
    if different := [line for line in lines if line.split(":")[0] not in free]:
        remedy = "use the same model, or another --workdir"
        what = f"a checkpoint of another model (config.{'; config.'.join(different)})"
        raise UserError(f"{where}: {what}; {remedy}")


def require_same_shapes(
    expected: Mapping[str, Any], given: Mapping[str, Any], where: str, *, part: str = "model"
) -> None:
    """Raises UserError unless `given` has exactly the names and shapes of `expected`."""
    wanted, found = (
        {name: tuple(getattr(value, "shape", value)) for name, value in values.items()}
        for values in (expected, given)
    )
    if different := [name for name in wanted | found if wanted.get(name) != found.get(name)]:
        what, remedy = "weights of another model", "or another --workdir"
        if part == "training":
            what = "an optimizer of another configuration, or of an older version"
            remedy = "or start from its weights in another --workdir (config.init_from)"
        names = f"{different[0]} and {len(different) - 1} more differ"
        raise UserError(
            f"{where}: {what} ({names}); use the configuration it was trained with, {remedy}"
        )


def require_match(
    weights: Weights, config: Mapping[str, Any], shapes: Mapping[str, Any], where: str
) -> None:
    """Raises UserError unless `weights` are those of this configuration, with these shapes."""
    require_same_model(weights.metadata["config"], config, where)
    require_same_shapes(shapes, weights.params | weights.norm_stats, where)


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return json.loads((checkpoint / "metadata" / "metadata").read_text(encoding="utf-8"))


def read_layout(checkpoint: Path) -> dict[str, Layout]:
    """Of each part; empty for older checkpoints, whose arrays are not packed."""
    folder = checkpoint / "layout"
    if not folder.is_dir():
        return {part: {} for part in PARTS}
    return json.loads((folder / "metadata").read_text(encoding="utf-8"))


def read_arrays(
    folder: Path,
    layout: Layout,
    *,
    only: str | None = None,
    like: Mapping[str, jax.Array] | None = None,
) -> dict[str, Any]:
    """Arrays of one part of a checkpoint by name; `only`: of one part of the state, such as "ema".

    Those of the same name and shape as one `like` them get its place on the devices, unless they
    were packed; all others are numpy.
    """
    import orbax.checkpoint as ocp  # which reading a file of weights can do without

    like = like or {}

    def target(name: str, saved: Any) -> ocp.RestoreArgs:
        wanted = like.get(name)
        if wanted is None or tuple(wanted.shape) != tuple(saved.shape):
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=wanted.sharding, dtype=wanted.dtype)

    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as reader:
        # the reader's own `metadata` warns of a file that only whole checkpoints have
        saved = handler.metadata(folder).tree
        names = [name for name in saved if only in (None, part_of(name))]
        if not names:
            return {}
        args = ocp.args.PyTreeRestore(
            item=dict.fromkeys(names, 0),
            restore_args={name: target(name, saved[name]) for name in names},
            partial_restore=True,
        )
        return unpack(reader.restore(folder, args=args), layout)


@contextlib.contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turns what reading a damaged checkpoint raises into a DamagedCheckpoint that names it.

    For an array whose bytes are cut orbax raises a plain Exception, of no class of its own: that
    very class counts too, its subclasses do not.
    """
    try:
        yield
    except BaseException as error:
        damaged = isinstance(error, FILE_ERRORS) or type(error) is Exception
        if isinstance(error, UserError) or not damaged:
            raise
        raise DamagedCheckpoint(path, reason_of(error)) from error


def reason_of(error: BaseException) -> str:
    """The first line of an error, not too long."""
    return str(error).split("\n")[0][:200] or type(error).__name__
