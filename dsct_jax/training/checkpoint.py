"""Checkpoints of a run (orbax): save, exact resume, and the weights alone.

A checkpoint has two parts, so that prediction reads only what it needs: `model` (parameters and
    norm statistics) and `training` (step,
optimizer, moving average, count of skipped steps). Both are packed (packing.py); `layout` tells
what lies where. The position in the data and all random numbers are functions of the seed and the
step, which the metadata tell for people too, with the configuration, the class names, the versions
and the best validation so far.
"""

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dsct_jax.config import differences
from dsct_jax.errors import UserError
from dsct_jax.model.build import FlatParams
from dsct_jax.training.packing import Layout, pack, part_of, shapes_of, unpack
from dsct_jax.training.step import TrainState

DIRECTORY = "checkpoints"
DAMAGED = "damaged_checkpoints"  # where the run puts what it could not read
TRAINING_FIELDS = ("step", "opt_state", "ema", "skipped", "skipped_total")  # of a TrainState
FREE_FIELDS = ("model.compute_dtype", "model.remat")  # how the same model is computed
PARTS = ("model", "training")
CHUNK_BYTES = 2**25  # of a long array, written and read side by side
MODEL_FIELDS = ("class_names", "multi_label", "model")  # of a configuration: what the weights mean
# What orbax and tensorstore raise for files that were cut, emptied or removed, and for a disk that
# is full.
_FILE_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
_log = logging.getLogger(__name__)


class DamagedCheckpoint(UserError):
    """A complete checkpoint whose files cannot be read; `reason` in a few words."""

    def __init__(self, path: Path, reason: str):
        super().__init__(
            f"{path}: this checkpoint is damaged ({reason}); remove it to continue from the one "
            "before"
        )
        self.reason = reason


def _names(tree: Any) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator=".").replace("/", ".")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _by_name(tree: Any) -> dict[str, Any]:
    return dict(zip(_names(tree), jax.tree.leaves(tree), strict=True))


def _parts(state: TrainState) -> dict[str, dict[str, Any]]:
    """The arrays of each of PARTS, by name."""
    model = {"params": state.params | state.frozen_params, "frozen": state.norm_stats}
    return {
        "model": _by_name(model),
        "training": _by_name({name: getattr(state, name) for name in TRAINING_FIELDS}),
    }


class _NewestAndBest:
    """Which checkpoints orbax keeps: the last `keep`, and the best one."""

    def __init__(self, keep: int):
        self.keep = keep
        self.best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One answer for each checkpoint, oldest first; orbax's interface."""
        del context
        first_kept = len(checkpoints) - self.keep
        return [
            number >= first_kept or checkpoint.step == self.best
            for number, checkpoint in enumerate(checkpoints)
        ]


class Checkpoints:
    """The checkpoints below `workdir`; writes in the background, an unfinished one is never read."""

    def __init__(self, workdir: Path, *, keep: int = 3, metadata: dict[str, Any] | None = None):
        self._policy = _NewestAndBest(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            cleanup_tmp_directories=metadata is not None,
            create=metadata is not None,
        )
        arrays = {part: ocp.StandardCheckpointHandler() for part in PARTS}
        handlers = arrays | {
            "layout": ocp.JsonCheckpointHandler(),
            "metadata": ocp.JsonCheckpointHandler(),
        }
        try:
            self._manager = ocp.CheckpointManager(
                (workdir / DIRECTORY).absolute(), options=options, item_handlers=handlers
            )
        except OSError as error:
            raise UserError(
                f"--workdir={workdir}: cannot be used ({error.strerror}); name another directory"
            ) from error
        self._metadata = metadata or {}
        self._workdir = workdir

    def all_steps(self) -> list[int]:
        """Steps of all complete checkpoints."""
        return list(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, *, progress: Mapping[str, Any] | None = None) -> None:
        """Starts writing; returns before it is done.

        Args:
            progress: goes into the metadata; `best_step` in it names the checkpoint that is kept
                however old it gets.

        Raises:
            UserError: this or the checkpoint before could not be written, such as on a full disk.
                Those before stay as they are.
        """
        step = int(state.step)
        if step == self.latest_step():
            return
        chunked, arrays, layout = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), {}, {}
        for part, values in _parts(state).items():
            packed, layout[part] = pack(values)
            arrays[part] = ocp.args.StandardSave(packed, save_args=dict.fromkeys(packed, chunked))
        self._policy.best = (progress or {}).get("best_step")
        metadata = self._metadata | {"progress": dict(progress or {})}
        with self._failure_reported():
            args = ocp.args.Composite(
                **arrays, layout=ocp.args.JsonSave(layout), metadata=ocp.args.JsonSave(metadata)
            )
            self._manager.save(step, args=args)

    def check(self) -> None:
        """Raises UserError when a checkpoint that is written in the background has failed."""
        with self._failure_reported():
            self._manager.check_for_errors()

    def restore_newest(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, as `restore`, and its metadata; None where there
        is none.

        Damaged ones are moved to `damaged_checkpoints`, with one line each. Raises UserError when
        all are damaged, or one is of another model.
        """
        steps = sorted(self.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = self.restore(state, step)
            except DamagedCheckpoint as error:
                if step == steps[-1]:
                    raise
                self._quarantine(step, error.reason)
                continue
            metadata = _read_metadata(Path(self._manager.directory) / str(step))
            self._policy.best = metadata.get("progress", {}).get("best_step")
            return restored, metadata
        return None

    def _quarantine(self, step: int, reason: str) -> None:
        if jax.process_index() == 0:
            _log.warning(
                "checkpoint %d is damaged (%s): moved to %s; the one before is taken",
                step,
                reason,
                self._workdir / DAMAGED,
            )
            place = self._workdir / DAMAGED / str(step)
            place.parent.mkdir(exist_ok=True)
            if place.exists():
                shutil.rmtree(place)
            (Path(self._manager.directory) / str(step)).rename(place)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged checkpoint {step}")
        self._manager.reload()

    def restore(self, state: TrainState, step: int | None = None) -> TrainState:
        """A checkpoint (None: the newest) in the place, shapes and shardings of `state`; raises
        UserError when of another model or damaged.
        """
        step = self.latest_step() if step is None else step
        path = Path(self._manager.directory) / str(step)
        with _damage_reported(path):
            require_same_model(_read_metadata(path)["config"], self._metadata["config"], str(path))
            saved, layout = self._manager.item_metadata(step), _read_layout(path)
            parts, templates = _parts(state), {}
            for part, values in parts.items():
                packed = dict(saved[part])
                require_same_shapes(values, shapes_of(packed, layout[part]), str(path))
                templates[part] = {
                    name: _template(found, values.get(name)) for name, found in packed.items()
                }
            args = ocp.args.Composite(
                **{part: ocp.args.StandardRestore(template) for part, template in templates.items()}
            )
            restored = self._manager.restore(step, args=args)
            model, training = (
                _device_put_like(unpack(restored[part], layout[part]), like=parts[part])
                for part in PARTS
            )

        def fill(tree: Any, source: dict[str, Any], prefix: str) -> Any:
            leaves = [source[name] for name in _names({prefix: tree})]
            return jax.tree.unflatten(jax.tree.structure(tree), leaves)

        return dataclasses.replace(
            state,
            params=fill(state.params, model, "params"),
            frozen_params=fill(state.frozen_params, model, "params"),
            norm_stats=fill(state.norm_stats, model, "frozen"),
            **{name: fill(getattr(state, name), training, name) for name in TRAINING_FIELDS},
        )

    def wait(self) -> None:
        """Returns when everything is on disk; raises UserError when it could not be written."""
        with self._failure_reported():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes writing and lets the directory go; raises UserError when something could not be
        written.
        """
        with self._failure_reported():
            self._manager.close()

    @contextlib.contextmanager
    def _failure_reported(self) -> Iterator[None]:
        try:
            yield
        except _FILE_ERRORS as error:
            where, before = self._workdir / DIRECTORY, "those before are whole"
            raise UserError(
                f"{where}: a checkpoint could not be written ({_reason(error)}); {before}: make "
                "room, then run again"
            ) from error


def _template(saved: Any, wanted: jax.Array | None) -> Any:
    """What orbax shall restore an array as: in the place of `wanted`; without one, a numpy array on
    every process.
    """
    if wanted is None:
        return np.broadcast_to(np.zeros((), saved.dtype), saved.shape)  # takes no memory
    return jax.ShapeDtypeStruct(wanted.shape, wanted.dtype, sharding=wanted.sharding)


def _device_put_like(
    values: Mapping[str, Any], *, like: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Arrays of the host in the type and place of those of the same name; arrays on devices as they
    are.
    """

    def place(value: Any, wanted: jax.Array) -> jax.Array:
        if isinstance(value, jax.Array):
            return value
        return jax.make_array_from_callback(
            wanted.shape,
            wanted.sharding,
            lambda index: value[index].astype(wanted.dtype, copy=False),
        )

    return {name: place(values[name], wanted) for name, wanted in like.items()}


def require_same_model(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raises UserError, naming the fields, when two configurations describe different models:
    shapes alone do not tell how a model computes.
    """
    different = [
        line
        for key in MODEL_FIELDS
        if key in stored
        for line in differences({key: stored[key]}, {key: wanted[key]})
        if not line.startswith(FREE_FIELDS)
    ]
    if different:
        raise UserError(
            f"{where}: a checkpoint of another model (config.{'; config.'.join(different)}); use "
            "the same model, or another --workdir"
        )


def require_same_shapes(expected: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    """Raises UserError, naming the first difference, unless `given` has exactly the names and
    shapes of `expected`.
    """

    def shape(values: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
        value = values.get(name)
        return None if value is None else tuple(value if isinstance(value, tuple) else value.shape)

    different = [
        name for name in {**expected, **given} if shape(expected, name) != shape(given, name)
    ]
    if different:
        raise UserError(
            f"{where}: weights of another model ({different[0]} and {len(different) - 1} more "
            "differ); "
            "use the configuration it was trained with, or another --workdir"
        )


def load_weights(
    workdir: Path, step: int | None = None, *, ema: bool = True
) -> tuple[FlatParams, FlatParams, dict[str, Any]]:
    """Weights of a checkpoint below `workdir` as numpy: (parameters, norm statistics, metadata).
    Any number of devices.

    Args:
        step: of the checkpoint; None: the newest that can be read.
        ema: take the moving average of the trained parameters, where the run kept one.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    _require_run(workdir)
    checkpoints = Checkpoints(workdir)
    steps = sorted(checkpoints.all_steps(), reverse=True)
    checkpoints.close()
    if not steps:
        raise UserError(
            f"{workdir / DIRECTORY}: holds no complete checkpoint; train first, or wait until one "
            "is written"
        )
    if step is not None and step not in steps:
        raise UserError(
            f"{workdir / DIRECTORY}: holds no checkpoint of step {step}; there are "
            f"{', '.join(map(str, reversed(steps)))}"
        )
    if step is not None:
        return _weights_of(workdir, step, ema=ema)
    for step in steps[:-1]:
        try:
            return _weights_of(workdir, step, ema=ema)
        except DamagedCheckpoint as error:
            _log.warning(
                "checkpoint %d is damaged (%s): the one before is taken", step, error.reason
            )
    return _weights_of(workdir, steps[-1], ema=ema)


def _weights_of(
    workdir: Path, step: int, *, ema: bool
) -> tuple[FlatParams, FlatParams, dict[str, Any]]:
    path = (workdir / DIRECTORY / str(step)).absolute()
    reader = ocp.PyTreeCheckpointer()
    with _damage_reported(path):
        metadata = _read_metadata(path)
        layout = _read_layout(path)
        leaves = reader.metadata(path / "model").item_metadata.tree
        restored = reader.restore(
            path / "model",
            restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in leaves},
        )
        values = unpack(restored, layout["model"])
    parts: dict[str, FlatParams] = {"params": {}, "frozen": {}}
    for name, leaf in values.items():
        part, rest = name.split(".", 1)
        parts[part][rest.replace(".", "/")] = leaf
    if ema:
        with _damage_reported(path):
            parts["params"] |= _moving_average(path / "training", layout["training"])
    return parts["params"], parts["frozen"], metadata


def _moving_average(training: Path, layout: Layout) -> FlatParams:
    """The moving average of the trained parameters in a checkpoint's part `training`, as numpy; {}
    where the run kept none.
    """
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        names = [
            name for name in reader.metadata(training).item_metadata.tree if part_of(name) == "ema"
        ]
        if not names:
            return {}
        wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        args = ocp.args.PyTreeRestore(
            item=dict.fromkeys(names, 0), restore_args=wanted, partial_restore=True
        )
        values = unpack(reader.restore(training, args=args), layout)
    return {name.removeprefix("ema.").replace(".", "/"): leaf for name, leaf in values.items()}


def _require_run(workdir: Path) -> None:
    if not (workdir / DIRECTORY).is_dir():
        raise UserError(f"{workdir}: no {DIRECTORY}/ here; give the --workdir of a training run")


def newest_step(workdir: Path) -> int | None:
    """Step of the newest complete checkpoint below `workdir`; None where there is none."""
    folder = workdir / DIRECTORY
    return (
        max((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=None)
        if folder.is_dir()
        else None
    )


def best_step(workdir: Path) -> int:
    """Step of the checkpoint with the best validation so far, as the newest one tells. Raises
    UserError where no validation was saved.
    """
    _require_run(workdir)
    newest = newest_step(workdir)
    path = workdir / DIRECTORY / str(newest)
    with _damage_reported(path):
        found = (
            None if newest is None else _read_metadata(path).get("progress", {}).get("best_step")
        )
    if found is None:
        raise UserError(
            f"{workdir / DIRECTORY}: no checkpoint tells of a validation, so none is the best; "
            "take the newest"
        )
    return found


def parse_run_path(path: Path) -> tuple[Path, int | None]:
    """(workdir, step) of RUN, RUN/checkpoints (both: None, the newest) or RUN/checkpoints/STEP."""
    if path.parent.name == DIRECTORY and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path.parent if path.name == DIRECTORY else path, None


def _read_metadata(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "metadata" / "metadata").read_text())


def _read_layout(checkpoint: Path) -> dict[str, Layout]:
    """Of each part; empty for checkpoints from before arrays were packed."""
    folder = checkpoint / "layout"
    return (
        json.loads((folder / "metadata").read_text())
        if folder.is_dir()
        else {part: {} for part in PARTS}
    )


def _reason(error: BaseException) -> str:
    return str(error).split("\n")[0][:200] or type(error).__name__


class _damage_reported(contextlib.AbstractContextManager):
    """Turns what reading a damaged checkpoint raises into a DamagedCheckpoint that names it.

    For an array whose bytes are cut orbax raises a plain Exception, of no class of its own: that
        very class counts too, its subclasses do not.
    """

    def __init__(self, path: Path):
        self.path = path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any
    ) -> None:
        if (
            kind is not None
            and error is not None
            and not isinstance(error, UserError)
            and (kind is Exception or issubclass(kind, _FILE_ERRORS))
        ):
            raise DamagedCheckpoint(self.path, _reason(error)) from error
