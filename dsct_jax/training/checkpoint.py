"""Writing the checkpoints of a run (orbax), and the exact resume from the newest.

weights/run_directory.py has what a checkpoint holds, and reads the weights alone. The position in
the data and all random numbers are functions of the seed and the step.
"""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dsct_jax.errors import UserError
from dsct_jax.training.step import TrainState
from dsct_jax.weights.modalities import require_same_modalities, without_modalities
from dsct_jax.weights.packing import pack
from dsct_jax.weights.run_directory import (
    DIRECTORY,
    FILE_ERRORS,
    DamagedCheckpoint,
    damage_reported,
    read_arrays,
    read_layout,
    read_metadata,
    reason_of,
    require_same_model,
    require_same_shapes,
)

DAMAGED = "damaged_checkpoints"  # where the run puts what it could not read
TRAINING_FIELDS = ("step", "opt_state", "ema", "skipped", "skipped_total")  # of a TrainState
CHUNK_BYTES = 2**25  # of a long array, written and read side by side
_log = logging.getLogger(__name__)


def _names(tree: Any) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator=".").replace("/", ".")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _by_name(tree: Any) -> dict[str, Any]:
    return dict(zip(_names(tree), jax.tree.leaves(tree), strict=True))


def _parts(state: TrainState) -> dict[str, dict[str, Any]]:
    """The arrays of both parts of a checkpoint, by name."""
    norm_stats = without_modalities(state.norm_stats)
    model = {"params": state.params | state.frozen_params, "frozen": norm_stats}
    training = {name: getattr(state, name) for name in TRAINING_FIELDS}
    return {"model": _by_name(model), "training": _by_name(training)}


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
    """The checkpoints below `workdir`; writes in the background, an unfinished one is never read.

    `metadata` goes into each of them: the configuration ("config"), versions and the like.
    """

    def __init__(self, workdir: Path, *, metadata: Mapping[str, Any], keep: int = 3):
        self._workdir, self._metadata = workdir, dict(metadata)
        self._policy = _NewestAndBest(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy, cleanup_tmp_directories=True, create=True
        )
        try:
            self._manager = ocp.CheckpointManager((workdir / DIRECTORY).absolute(), options=options)
        except OSError as error:
            raise UserError(
                f"--workdir={workdir}: cannot be used ({error.strerror}); name another directory"
            ) from error

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        *,
        progress: Mapping[str, Any] | None = None,
        decoder: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts writing; returns before it is done.

        Args:
            progress: goes into the metadata; `best_step` in it names the checkpoint that is kept
                however old it gets.
            decoder: what a validation of these very weights fitted; goes into the metadata.

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
        metadata = self._metadata | {"progress": dict(progress or {})}
        if decoder is not None:
            metadata["decoder"] = dict(decoder)
        self._policy.best = metadata["progress"].get("best_step")
        texts = {"layout": ocp.args.JsonSave(layout), "metadata": ocp.args.JsonSave(metadata)}
        with self._failure_reported():
            self._manager.save(step, args=ocp.args.Composite(**arrays, **texts))

    def restore_newest(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, as `restore`, and its metadata; None where there
        is none.

        Damaged ones are moved to `damaged_checkpoints`, with one line each. Raises UserError when
        all are damaged, or one is of another model.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = self.restore(state, step)
            except DamagedCheckpoint as error:
                if step == steps[-1]:
                    raise
                self._quarantine(step, error.reason)
                continue
            metadata = read_metadata(self._path(step))
            self._policy.best = metadata.get("progress", {}).get("best_step")
            return restored, metadata
        return None

    def _path(self, step: int) -> Path:
        return Path(self._manager.directory) / str(step)

    def _quarantine(self, step: int, reason: str) -> None:
        if jax.process_index() == 0:
            place = self._workdir / DAMAGED / str(step)
            _log.warning(
                "checkpoint %d is damaged (%s): moved to %s; the one before is taken",
                step,
                reason,
                place.parent,
            )
            place.parent.mkdir(exist_ok=True)
            if place.exists():
                shutil.rmtree(place)
            self._path(step).rename(place)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged checkpoint {step}")
        self._manager.reload()

    def restore(self, state: TrainState, step: int | None = None) -> TrainState:
        """A checkpoint (None: the newest) in the place, shapes and shardings of `state`; raises
        UserError when of another model or damaged.
        """
        step = self.latest_step() if step is None else step
        path, values = self._path(step or 0), dict[str, jax.Array]()
        with damage_reported(path):
            metadata, mine = read_metadata(path), self._metadata
            require_same_model(metadata["config"], mine["config"], str(path))
            require_same_modalities(metadata.get("modalities", {}), mine.get("modalities", {}))
            layout = read_layout(path)
            for part, wanted in _parts(state).items():
                found = read_arrays(path / part, layout[part], like=wanted)
                require_same_shapes(wanted, found, str(path), part=part)
                values |= {name: _place(found[name], like) for name, like in wanted.items()}

        def fill(tree: Any, prefix: str) -> Any:
            leaves = [values[name] for name in _names({prefix: tree})]
            return jax.tree.unflatten(jax.tree.structure(tree), leaves)

        return dataclasses.replace(
            state,
            params=fill(state.params, "params"),
            frozen_params=fill(state.frozen_params, "params"),
            norm_stats=state.norm_stats | fill(without_modalities(state.norm_stats), "frozen"),
            **{name: fill(getattr(state, name), name) for name in TRAINING_FIELDS},
        )

    def check(self) -> None:
        """Raises UserError when a checkpoint that is written in the background has failed."""
        with self._failure_reported():
            self._manager.check_for_errors()

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
        except FILE_ERRORS as error:
            raise UserError(
                f"{self._workdir / DIRECTORY}: a checkpoint could not be written "
                f"({reason_of(error)}); those before are whole: make room, then run again"
            ) from error


def _place(value: Any, like: jax.Array) -> jax.Array:
    """An array of the host in the type and place of `like`; an array on devices as it is."""
    if isinstance(value, jax.Array):
        return value
    return jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: value[index].astype(like.dtype, copy=False)
    )
