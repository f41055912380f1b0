"""The network as an ONNX graph, through jax2onnx.

jax2onnx translates JAX's primitives well, but patches functions of Flax and jax.numpy, wires scans
with wrong shapes, and mistakes a max-pool of NHWC maps (0.17.1). So it is given the traced program
in its `reference` form, which has no scans, with inner calls inlined and the pooling written out.
The batch is a fixed number: with a symbolic one it writes a graph that onnxruntime rejects.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from dsct_jax.errors import UserError
from dsct_jax.inference.load import Model
from dsct_jax.preprocess import Size

OUTPUTS = ("logits", "boxes")
_LOWEST = np.finfo(np.float32).min
_INSTALL = "pip install 'dsct-jax[onnx]' (docs/weights.md)"


def write_onnx(
    model: Model, path: Path, size: Size, *, batch_size: int, notes: dict[str, str]
) -> None:
    """Writes the network for float32 images [batch_size height width 3] and their padding, with
    `notes` as metadata. Raises UserError when jax2onnx or onnx is not installed.
    """
    try:
        import jax2onnx
        import onnx
    except ImportError as error:
        raise UserError(f"--format=onnx needs {error.name}: {_INSTALL}") from None
    # it reports every optional plugin that it does without
    logging.getLogger("jax2onnx").setLevel(logging.ERROR)

    def forward(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        network = model.functions.bind(model.params, model.norm_stats)
        predictions = network(*inputs, implementation="reference")
        return predictions.logits[-1], predictions.boxes[-1]

    named = model.functions.input_specs(batch_size, size)
    specs = list(named.values())
    program = jax.make_jaxpr(forward)(*specs)
    program = jax.make_jaxpr(lambda *inputs: _run(program.jaxpr, program.consts, inputs))(*specs)
    call = lambda *inputs: tuple(_run(program.jaxpr, program.consts, inputs))  # noqa: E731
    graph = jax2onnx.to_onnx(call, inputs=specs, model_name="dsct")
    theirs = [value.name for value in (*graph.graph.input, *graph.graph.output)]
    _rename(graph.graph, dict(zip(theirs, (*named, *OUTPUTS), strict=True)))
    for name, text in sorted(notes.items()):
        graph.metadata_props.add(key=name, value=text)
    onnx.checker.check_model(graph)
    path.write_bytes(graph.SerializeToString(deterministic=True))


def onnx_session(path: Path) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Both inputs -> (logits, boxes), computed by onnxruntime from the file on the CPU."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"--format=onnx is checked with onnxruntime: {_INSTALL}") from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda *inputs: tuple(session.run(list(OUTPUTS), dict(zip(names, inputs, strict=True))))


def _run(program: Jaxpr, constants: Any, inputs: Any) -> list[Any]:
    """The program without inner calls, and with pooling as the maximum of shifted slices."""
    values = dict(zip((*program.constvars, *program.invars), (*constants, *inputs), strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]  # noqa: E731
    for equation in program.eqns:
        arguments = [read(atom) for atom in equation.invars]
        parameters, name = equation.params, equation.primitive.name
        inner: Any = parameters.get("call_jaxpr", parameters.get("jaxpr"))
        if name in ("jit", "pjit", "custom_jvp_call", "custom_vjp_call"):
            results = _run(inner.jaxpr, inner.consts, arguments)
        elif name == "remat2":
            results = _run(inner, (), arguments)
        elif name == "reduce_window_max":
            window, strides = parameters["window_dimensions"], parameters["window_strides"]
            results = [_max_pool(arguments[0], window, strides, parameters["padding"])]
        elif name == "stop_gradient" or (name == "tile" and set(parameters["reps"]) == {1}):
            results = arguments
        else:
            found = equation.primitive.bind(*arguments, **parameters)
            results = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in program.outvars]


def _max_pool(
    x: jax.Array, window: Sequence[int], strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> jax.Array:
    if any(map(any, padding)):
        x = jax.lax.pad(x, jnp.asarray(_LOWEST, x.dtype), [(low, high, 0) for low, high in padding])
    counts = [(n - w) // s + 1 for n, w, s in zip(x.shape, window, strides, strict=True)]
    reach = [(count - 1) * stride + 1 for count, stride in zip(counts, strides, strict=True)]
    parts = (
        jax.lax.slice(x, start, [a + b for a, b in zip(start, reach, strict=True)], strides)
        for start in itertools.product(*map(range, window))
    )
    return functools.reduce(jax.lax.max, parts)


def _rename(graph: Any, names: dict[str, str]) -> None:
    """Gives the graph's inputs and outputs our names, wherever they occur."""
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for values in (node.input, node.output):
            for i, name in enumerate(values):
                values[i] = names.get(name, name)
