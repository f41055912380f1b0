"""Checkpoints of a run (orbax): save, exact resume, and the weights alone.

A checkpoint has two parts, so that prediction reads only what it needs: `model` (parameters and frozen statistics) and `training` (step,
optimizer, moving average, count of skipped steps). The position in the data and all random numbers are functions of the seed and the step, so
nothing else has to be kept.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dsct_jax.errors import UserError
from dsct_jax.settings import differences
from dsct_jax.state import Flat
from dsct_jax.step import TrainState

DIRECTORY = "checkpoints"
TRAINING_FIELDS = ("step", "opt_state", "ema", "skipped", "skipped_total")  # of a TrainState
FREE_FIELDS = ("model.compute_dtype", "model.remat")  # how the same model is computed
MODEL_FIELDS = ("class_names", "multi_label", "model")  # of a configuration: what the weights mean


def _names(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path, simple=True, separator=".").replace("/", ".") for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _by_name(tree: Any) -> dict[str, Any]:
    return dict(zip(_names(tree), jax.tree.leaves(tree), strict=True))


def _parts(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    model = {"params": state.params | state.fixed, "frozen": state.frozen}
    return _by_name(model), _by_name({name: getattr(state, name) for name in TRAINING_FIELDS})


class Checkpoints:
    """The checkpoints below `workdir`; writes in the background, an unfinished one is never read."""

    def __init__(self, workdir: Path, *, keep: int = 3, metadata: dict[str, Any] | None = None):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=metadata is not None, create=metadata is not None)
        handlers = {"model": ocp.StandardCheckpointHandler(), "training": ocp.StandardCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
        try:
            self._manager = ocp.CheckpointManager((workdir / DIRECTORY).absolute(), options=options, item_handlers=handlers)
        except OSError as error:
            raise UserError(f"--workdir={workdir}: cannot be used ({error.strerror}); name another directory") from error
        self._metadata = metadata or {}

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts writing; returns before it is done."""
        step = int(state.step)
        if step == self.latest_step():
            return
        model, training = _parts(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model), training=ocp.args.StandardSave(training), metadata=ocp.args.JsonSave(self._metadata)
            ),
        )

    def restore(self, state: TrainState) -> TrainState:
        """The newest checkpoint in the place, shapes and shardings of `state`; raises UserError when it is of another model or damaged."""
        step = self.latest_step()
        path = Path(self._manager.directory) / str(step)
        templates = [
            {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in part.items()} for part in _parts(state)
        ]
        with _damage_reported(path):
            require_same_model(_read_metadata(path)["config"], self._metadata["config"], str(path))
            saved = self._manager.item_metadata(step)
            for template, part in zip(templates, ("model", "training"), strict=True):
                require_same_shapes(template, dict(saved[part]), str(path))
            args = ocp.args.Composite(model=ocp.args.StandardRestore(templates[0]), training=ocp.args.StandardRestore(templates[1]))
            restored = self._manager.restore(step, args=args)
        model, training = restored["model"], restored["training"]

        def fill(tree: Any, source: dict[str, Any], prefix: str) -> Any:
            leaves = [source[name] for name in _names({prefix: tree})]
            return jax.tree.unflatten(jax.tree.structure(tree), leaves)

        return dataclasses.replace(
            state,
            params=fill(state.params, model, "params"),
            fixed=fill(state.fixed, model, "params"),
            frozen=fill(state.frozen, model, "frozen"),
            **{name: fill(getattr(state, name), training, name) for name in TRAINING_FIELDS},
        )

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes writing and lets the directory go."""
        self._manager.close()


def require_same_model(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raises UserError, naming the fields, when two configurations describe different models: shapes alone do not tell how a model computes."""
    different = [
        line
        for key in MODEL_FIELDS
        if key in stored
        for line in differences({key: stored[key]}, {key: wanted[key]})
        if not line.startswith(FREE_FIELDS)
    ]
    if different:
        raise UserError(f"{where}: a checkpoint of another model (config.{'; config.'.join(different)}); use the same model, or another --workdir")


def require_same_shapes(expected: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    """Raises UserError, naming the first difference, unless `given` has exactly the names and shapes of `expected`."""

    def shape(values: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
        value = values.get(name)
        return None if value is None else tuple(value if isinstance(value, tuple) else value.shape)

    different = [name for name in {**expected, **given} if shape(expected, name) != shape(given, name)]
    if different:
        raise UserError(
            f"{where}: weights of another model ({different[0]} and {len(different) - 1} more differ); "
            "use the configuration it was trained with, or another --workdir"
        )


def load_weights(workdir: Path, *, ema: bool = True) -> tuple[Flat, Flat, dict[str, Any]]:
    """Weights of the newest checkpoint below `workdir` as numpy: (parameters, frozen statistics, metadata). Any number of devices.

    With `ema` the trained parameters are their moving average, where the run kept one.
    """
    if not (workdir / DIRECTORY).is_dir():
        raise UserError(f"{workdir}: no {DIRECTORY}/ here; give the --workdir of a training run")
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest_step()
    checkpoints.close()
    if step is None:
        raise UserError(f"{workdir / DIRECTORY}: holds no complete checkpoint; train first, or wait until one is written")
    path = (workdir / DIRECTORY / str(step)).absolute()
    reader = ocp.PyTreeCheckpointer()
    with _damage_reported(path):
        metadata = _read_metadata(path)
        leaves = reader.metadata(path / "model").item_metadata.tree
        restored = reader.restore(path / "model", restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in leaves})
    parts: dict[str, Flat] = {"params": {}, "frozen": {}}
    for name, leaf in restored.items():
        part, rest = name.split(".", 1)
        parts[part][rest.replace(".", "/")] = leaf
    if ema:
        with _damage_reported(path):
            parts["params"] |= _moving_average(path / "training")
    return parts["params"], parts["frozen"], metadata


def _moving_average(training: Path) -> Flat:
    """The moving average of the trained parameters in a checkpoint's part `training`, as numpy; {} where the run kept none."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        names = [name for name in reader.metadata(training).item_metadata.tree if name.startswith("ema.")]
        if not names:
            return {}
        wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        args = ocp.args.PyTreeRestore(item=dict.fromkeys(names, 0), restore_args=wanted, partial_restore=True)
        restored = reader.restore(training, args=args)
    return {name.removeprefix("ema.").replace(".", "/"): leaf for name, leaf in restored.items()}


def newest_checkpoint(workdir: Path) -> str:
    """ "step N" of the newest complete checkpoint below `workdir`; "" where there is none."""
    folder = workdir / DIRECTORY
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return f"step {max(steps)}" if steps else ""


def _read_metadata(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "metadata" / "metadata").read_text())


@contextlib.contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    """Turns what reading a damaged checkpoint raises into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # orbax raises anything, down to a bare Exception, for files that were cut or removed
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path}: this checkpoint is damaged ({reason}); remove it to continue from the one before") from error
