"""Where arrays live: the mesh ('data', 'model'), the split of a batch over it, and the rules that
spread a run's state over its devices.

A batch is split over both axes. They differ in what rules put on them: with `make_mesh(model=8)` on
hosts of 8 devices, state split along 'model' is spread inside a host and copied along 'data'.
"""

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsct_jax.batch import Batch
from dsct_jax.errors import UserError

AXES = ("data", "model")
BATCH = P(AXES)  # the first axis of everything that belongs to a batch
LAYERED = P(None, AXES)  # [layers b ...]

ShardRules = Sequence[tuple[str, str]]
# (regex over whole paths such as "opt_state/.*", axis of the mesh); the first that matches counts
FSDP: ShardRules = ((r"(params|ema|opt_state)/.*", "data"),)


def make_mesh(devices: Sequence[jax.Device] | None = None, *, model: int = 1) -> Mesh:
    """All devices of all processes (or those given) as a mesh of (devices / model, model)."""
    devices = list(jax.devices() if devices is None else devices)
    if model < 1 or len(devices) % model:
        wanted = f"it must divide the number of devices, {len(devices)}"
        raise UserError(f"the mesh's axis 'model' cannot be {model}: {wanted}")
    return Mesh(np.array(devices).reshape(-1, model), AXES)


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's part of a global batch -> global arrays, split along their first axis."""
    place = partial(jax.make_array_from_process_local_data, NamedSharding(mesh, BATCH))
    return jax.tree.map(lambda x: place(np.asarray(x)), batch)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies of every leaf on all devices."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def spec_of(
    path: str, shape: tuple[int, ...], mesh: Mesh, rules: ShardRules, *, min_size: int
) -> P:
    """How one array of at least `min_size` numbers is split: along its longest axis that fits."""
    axis = next((axis for pattern, axis in rules if re.fullmatch(pattern, path)), None)
    if axis is None or mesh.shape[axis] == 1 or np.prod(shape) < min_size:
        return P()
    fitting = [i for i, size in enumerate(shape) if size and size % mesh.shape[axis] == 0]
    if not fitting:
        return P()
    longest = max(fitting, key=lambda i: shape[i])
    return P(*(axis if i == longest else None for i in range(longest + 1)))


def state_sharding(state: Any, mesh: Mesh, *, rules: ShardRules = (), min_size: int = 2**14) -> Any:
    """The NamedSharding of every leaf of a `TrainState`, as a tree like it (leaves may be
    ShapeDtypeStructs); replicated without rules or below `min_size` numbers.

    Raises:
        UserError: a rule that is no regular expression, or names no axis of the mesh.
    """
    for pattern, axis in rules:
        if axis not in AXES:
            wrong = f"{axis!r} (of {pattern!r}) is not an axis of the mesh"
            raise UserError(f"shard_rules: {wrong}; use 'data' or 'model'")
        try:
            re.compile(pattern)
        except re.error as error:
            wrong = f"{pattern!r} is not a regular expression ({error})"
            raise UserError(f"shard_rules: {wrong}") from error

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_of(name, np.shape(leaf), mesh, rules, min_size=min_size))

    return jax.tree_util.tree_map_with_path(sharding, state)


_END = object()


class Prefetch:
    """Iterates over `place(item)` of every item of `source`, computed by one thread up to `depth`
    ahead; errors are raised where the item would have come. Use as a context manager: leaving it
    closes a source that can be closed, so that its workers stop at once.
    """

    def __init__(self, source: Iterable[Any], place: Callable[[Any], Any], *, depth: int = 2):
        self._source, self._place, self._depth = iter(source), place, depth
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._wait = 0.0

    def _produce(self) -> Any:
        item = next(self._source, _END)
        return item if item is _END else self._place(item)

    def __iter__(self) -> Iterator[Any]:
        submit = self._executor.submit
        ahead: deque[Future[Any]] = deque(submit(self._produce) for _ in range(self._depth))
        while True:
            start = time.monotonic()
            item = ahead.popleft().result()
            self._wait += time.monotonic() - start
            if item is _END:
                return
            ahead.append(submit(self._produce))
            yield item

    def pop_wait(self) -> float:
        """Seconds spent waiting since the last call."""
        wait, self._wait = self._wait, 0.0
        return wait

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: Any) -> None:
        self._executor.shutdown(cancel_futures=True)
        close = getattr(self._source, "close", None)
        if close is not None:
            close()
