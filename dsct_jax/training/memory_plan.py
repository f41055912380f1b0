"""What a training run will take, before it starts: parameters by module, and for each bucket
memory, compile time and arithmetic of a step.

Every program is compiled, none is run: memory is what the compiler assigned on one device.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsct_jax.batch import Batch, Targets
from dsct_jax.crops import CropConfig
from dsct_jax.model.modalities import PREFIX
from dsct_jax.parallel import BATCH
from dsct_jax.training.halves import shapes_from_host
from dsct_jax.training.step import TrainState, TrainStep

_MIB, _GIGA = 2**20, 1e9


class ModulePlan(NamedTuple):
    """Numbers of parameters of one part of the network."""

    name: str
    trained: int
    frozen: int  # by the optimizer's rules, and modalities; not the statistics of frozen norms


class ProgramPlan(NamedTuple):
    """One compiled program of a step; bytes on one device."""

    name: str
    compile_seconds: float  # tracing included; short where the compilation cache has it
    # as XLA counts them: the body of a loop (sampled attention) once, kernels not at all
    flops: float
    argument_bytes: int  # of what it reads: a first half has no use for the optimizer's state
    output_bytes: int  # without those that take the place of arguments
    temporary_bytes: int

    @property
    def live_bytes(self) -> int:
        """Everything that exists while it runs."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes


class BucketPlan(NamedTuple):
    """A step with images of one padded size."""

    image_shape: tuple[int, ...]  # b h w 3, global
    programs: tuple[ProgramPlan, ...]
    peak_bytes: int  # on one device: the largest program with what waits beside it


class Plan(NamedTuple):
    """See the module's docstring."""

    modules: tuple[ModulePlan, ...]
    state_bytes: int  # on one device: parameters, average, optimizer
    buckets: tuple[BucketPlan, ...]


def make_plan(
    step: TrainStep,
    state: TrainState,
    buckets: Sequence[tuple[int, int]],
    *,
    batch_size: int,
    max_targets: int,
    num_classes: int,
    crops: CropConfig | None = None,
) -> Plan:
    """Compiles the programs of `step` for every bucket.

    Args:
        state: as from `initial_state`, or ShapeDtypeStructs with shardings; only shapes and
            shardings are looked at.
        buckets: (height, width) of the padded images.
        batch_size: global, as the configuration's.
        crops: of a two-stage network, whose batches hold people.

    Raises:
        UserError: the batch cannot be split over the devices and the parts that are accumulated.
    """
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    # What exists beside a program although it is none of its arguments: what only the update reads,
    # and gradients that are being added up.
    unread = _bytes_on_a_device((state.opt_state, state.ema))
    sums = 4 * sum(x.size for x in state.params.values()) if step.config.accumulate > 1 else 0
    idle = {"first_half": unread + sums, "add_gradients": unread}
    plans = []
    for height, width in buckets:
        batch = _abstract_batch(
            *(batch_size, height, width, max_targets, num_classes, step.mesh), crops
        )
        programs = tuple(_programs(step, state, batch))
        peak = max(program.live_bytes + idle.get(program.name, 0) for program in programs)
        plans.append(BucketPlan(batch.images.shape, programs, peak))
    return Plan(_modules(state), _bytes_on_a_device(state), tuple(plans))


def format_plan(plan: Plan) -> str:
    """The plan as text: two tables and a line between them."""
    lines = [f"{'module':<24}{'trained':>14}{'frozen':>14}"]
    trained = sum(module.trained for module in plan.modules)
    frozen = sum(module.frozen for module in plan.modules)
    for module in (*plan.modules, ModulePlan("all", trained, frozen)):
        lines.append(f"{module.name:<24}{module.trained:>14,}{module.frozen:>14,}")
    state = f"{plan.state_bytes / _MIB:,.0f} MiB (parameters, average, optimizer)"
    lines += ["", f"state on each device: {state}", ""]
    head = f"{'images':<20}{'program':<26}{'compile s':>10}{'GFLOP':>10}{'given MiB':>11}"
    lines.append(f"{head}{'made MiB':>10}{'temp MiB':>10}{'all MiB':>10}")
    for bucket in plan.buckets:
        shape = "x".join(map(str, bucket.image_shape[:3]))
        for program in bucket.programs:
            given, made, temporary, live = (
                size / _MIB for size in (*program[3:], program.live_bytes)
            )
            cost = f"{program.compile_seconds:>10.1f}{program.flops / _GIGA:>10.1f}"
            sizes = f"{given:>11,.0f}{made:>10,.0f}{temporary:>10,.0f}{live:>10,.0f}"
            lines.append(f"{shape:<20}{program.name:<26}{cost}{sizes}")
        lines.append(f"{shape:<20}{'peak of a step':<26}{bucket.peak_bytes / _MIB:>61,.0f}")
    return "\n".join(lines)


def _modules(state: TrainState) -> tuple[ModulePlan, ...]:
    counts: dict[str, list[int]] = {}
    modalities = {k: v for k, v in state.norm_stats.items() if k.startswith(PREFIX)}
    for column, values in enumerate((state.params, state.frozen_params | modalities)):
        for path, value in values.items():
            parts = path.split("/")
            name = "/".join(parts[:2]) if parts[0] in ("backbone", "modalities") else parts[0]
            counts.setdefault(name, [0, 0])[column] += value.size
    return tuple(ModulePlan(name, *numbers) for name, numbers in sorted(counts.items()))


def _bytes_on_a_device(tree: Any) -> int:
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _abstract_batch(
    b: int, height: int, width: int, t: int, k: int, mesh: Mesh, crops: CropConfig | None
) -> Batch:
    def struct(dtype, *shape):
        return jax.ShapeDtypeStruct((b, *shape), dtype, sharding=NamedSharding(mesh, BATCH))

    t, subject = (1, (crops.subject_size,) * 2) if crops else (t, ())
    targets = Targets(struct(np.float32, t, 4), struct(np.float32, t, k), struct(np.bool_, t))
    images, sizes = struct(np.uint8, height, width, 3), struct(np.int32, 2)
    subjects = struct(np.uint8, *subject, 3) if crops else None
    return Batch(images, sizes, targets, struct(np.int32), sizes, struct(np.bool_), subjects)


def _programs(step: TrainStep, state: TrainState, batch: Batch):
    """The programs in the order in which a step first runs them."""
    part = None if step.config.accumulate == 1 else jax.ShapeDtypeStruct((), np.int32)
    forward = solved = None
    if step.objective.host_half is not None:
        program, forward = _compile("first_half", step.first_half, state, batch, part)
        yield program
        solved = shapes_from_host(step.objective.host_half, forward.problem, step.mesh)
    if part is None:
        yield _compile("second_half", step.second_half, state, forward, solved, batch)[0]
        return
    grads = _struct(step.zeros.lower(state.params).compile(), step.zeros, state.params)
    program, (grads, sums) = _compile(
        "add_gradients", step.add_gradients, grads, state, forward, solved, batch, part
    )
    yield program
    yield _compile("update", step.update, state, grads, [sums] * step.config.accumulate, batch)[0]


def _compile(name: str, function: Any, *arguments: Any) -> tuple[ProgramPlan, Any]:
    start = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    program = ProgramPlan(
        name,
        seconds,
        float((cost or {}).get("flops", 0.0)),
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
    )
    return program, _struct(compiled, function, *arguments)


def _struct(compiled: Any, function: Any, *arguments: Any) -> Any:
    """What a compiled function returns, as ShapeDtypeStructs with the shardings that the compiler
    chose.
    """
    shapes, structure = jax.tree.flatten(jax.eval_shape(function, *arguments))
    placed = zip(shapes, jax.tree.leaves(compiled.output_shardings), strict=True)
    return jax.tree.unflatten(
        structure,
        [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x, sharding in placed],
    )
