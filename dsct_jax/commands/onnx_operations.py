"""JAX's primitives as ONNX operations: those that our networks use, one function per kind. What
depends on no input is computed here, and becomes a constant.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from dsct_jax.commands.onnx_graph import (
    EMIT,
    Graph,
    Shape,
    Tensor,
    Unsupported,
    emits,
    is_static,
    result,
)
from dsct_jax.commands.onnx_maps import in_convolution

_CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")
_SAME = ("stop_gradient", "name", "copy", "optimization_barrier")
_ELEMENTWISE = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min",
    "and": "And", "or": "Or", "eq": "Equal", "lt": "Less", "gt": "Greater",
    "le": "LessOrEqual", "ge": "GreaterOrEqual", "exp": "Exp", "log": "Log",
    "logistic": "Sigmoid", "sqrt": "Sqrt", "neg": "Neg", "abs": "Abs", "sign": "Sign",
    "floor": "Floor", "cos": "Cos", "sin": "Sin", "tanh": "Tanh", "not": "Not", "erf": "Erf",
}  # fmt: skip
_REDUCTIONS = {
    "reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin",
    "reduce_and": "ReduceMin", "reduce_or": "ReduceMax",
}  # fmt: skip
_LAST = np.iinfo(np.int64).max


def translate(
    graph: Graph, program: Jaxpr, constants: Sequence[Any], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """The results of `program`, whose operations are added to the graph. Raises Unsupported."""
    values: dict[Any, Tensor] = dict(zip(program.invars, inputs, strict=True))
    values |= zip(program.constvars, map(_constant, constants), strict=True)

    def read(atom: Any) -> Tensor:
        if isinstance(atom, Literal):
            aval: Any = atom.aval
            return _constant(np.asarray(atom.val, aval.dtype))
        return values[atom]

    for equation in program.eqns:
        results = _translate_one(graph, equation, [read(atom) for atom in equation.invars])
        values |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in program.outvars]


def _translate_one(graph: Graph, equation: Any, arguments: list[Tensor]) -> list[Tensor]:
    name, parameters = equation.primitive.name, equation.params
    avals = [variable.aval for variable in equation.outvars]
    if name in _CALLS and parameters.get("name") != "grid_sample":
        inner: Any = parameters.get("call_jaxpr", parameters.get("jaxpr"))
        if isinstance(inner, ClosedJaxpr):
            return translate(graph, inner.jaxpr, inner.consts, arguments)
        return translate(graph, inner, (), arguments)
    if name in _SAME:
        return arguments
    known = all(one.constant is not None and one.stored == one.shape for one in arguments)
    if known and all(is_static(aval.shape) for aval in avals) and name != "broadcast_in_dim":
        found = equation.primitive.bind(*(jnp.asarray(x.constant) for x in arguments), **parameters)
        return [_constant(x) for x in (found if equation.primitive.multiple_results else [found])]
    emit = EMIT.get("grid_sample" if name in _CALLS else name)
    if emit is None:
        raise Unsupported(f"--format=onnx: this network uses {name}, which has no translation")
    return emit(graph, arguments, parameters, avals)


def _constant(value: Any) -> Tensor:
    array = np.asarray(value)
    return Tensor(array.shape, array.dtype, array.shape, constant=array)


def _together(tensors: Sequence[Tensor], aval: Any) -> Shape:
    """The stored shape of an elementwise result: 1 where all of them have a pending broadcast."""
    stored = [one.stored for one in tensors if one.stored]
    return tuple(
        side if any(one[i] != 1 for one in stored) else 1 for i, side in enumerate(aval.shape)
    )


def _elementwise(name: str, kind: str) -> None:
    @emits(name)
    def emit(graph, inputs, parameters, avals):
        if inside := in_convolution(graph, name, inputs):
            return [result(inside, avals[0])]
        if name == "max" and inputs[1].constant is not None and not inputs[1].constant.any():
            relu = graph.node("Relu", graph.ref(inputs[0]))
            return [result(relu, avals[0], inputs[0].stored)]
        node = graph.node(kind, *map(graph.ref, inputs))
        return [result(node, avals[0], _together(inputs, avals[0]))]


for _name, _kind in _ELEMENTWISE.items():
    _elementwise(_name, _kind)


# elementwise operations that ONNX has in other words: (graph, names, parameters) -> name
_COMPOSED: dict[str, Callable[[Graph, list[str], Any], str]] = {
    "ne": lambda graph, names, _: graph.node("Not", graph.node("Equal", *names)),
    "rsqrt": lambda graph, names, _: graph.node("Reciprocal", graph.node("Sqrt", *names)),
    "square": lambda graph, names, _: graph.node("Mul", names[0], names[0]),
    "is_finite": lambda graph, names, _: graph.node(
        "Not", graph.node("Or", graph.node("IsInf", *names), graph.node("IsNaN", *names))
    ),
    # which, if false, if true
    "select_n": lambda graph, names, _: graph.node("Where", names[0], names[2], names[1]),
    # lowest, what, highest
    "clamp": lambda graph, names, _: graph.node("Min", graph.node("Max", *names[:2]), names[2]),
    "integer_pow": lambda graph, names, parameters: graph.node(
        "Pow", names[0], graph.store(np.float32(parameters["y"]))
    ),
}


def _composed(name: str) -> None:
    @emits(name)
    def emit(graph, inputs, parameters, avals):
        if name == "select_n" and inputs[0].dtype != bool:
            raise Unsupported("--format=onnx: a choice between more than two")
        node = _COMPOSED[name](graph, [graph.ref(one) for one in inputs], parameters)
        return [result(node, avals[0], _together(inputs, avals[0]))]


for _name in _COMPOSED:
    _composed(_name)


@emits("convert_element_type")
def _cast(graph, inputs, parameters, avals):
    if inputs[0].dtype == avals[0].dtype:
        return inputs
    node = graph.node("Cast", graph.ref(inputs[0]), to=graph.elem_type(avals[0].dtype))
    return [result(node, avals[0], inputs[0].stored)]


@emits("broadcast_in_dim")
def _broadcast(graph, inputs, parameters, avals):
    (x,), (aval,) = inputs, avals
    stored: list[Any] = [1] * len(aval.shape)
    for i, place in enumerate(parameters["broadcast_dimensions"]):
        stored[place] = x.stored[i]
    shape = tuple(stored)
    if x.constant is not None:
        array = x.constant.reshape(shape)
        return [Tensor(aval.shape, x.dtype, shape, constant=array)]
    name = graph.ref(x) if shape == x.stored else graph.reshape(graph.ref(x), shape)
    return [result(name, aval, shape)]


@emits("reshape", "squeeze")
def _reshape(graph, inputs, parameters, avals):
    (x,), shape = inputs, avals[0].shape
    if x.name in graph.maps and graph.maps[x.name].shape == shape:
        return [graph.maps[x.name]]
    if len(x.shape) == 4 and len(shape) == 2 and shape[1] == x.shape[3] and x.stored == x.shape:
        matrix = result(graph.reshape(graph.ref(x), shape), avals[0])
        graph.maps[matrix.name] = x
        return [matrix]
    return [result(graph.reshape(graph.whole(inputs[0]), avals[0].shape), avals[0])]


@emits("transpose")
def _transpose(graph, inputs, parameters, avals):
    order = list(map(int, parameters["permutation"]))
    node = graph.node("Transpose", graph.ref(inputs[0]), perm=order)
    return [result(node, avals[0], tuple(inputs[0].stored[i] for i in order))]


@emits("concatenate", "stack")
def _join(graph, inputs, parameters, avals):
    axis = parameters.get("dimension", parameters.get("axis"))
    names = [graph.whole(one) for one in inputs]
    if "axis" in parameters:
        names = [graph.node("Unsqueeze", name, graph.axes([axis])) for name in names]
    return [result(graph.node("Concat", *names, axis=int(axis)), avals[0])]


@emits("split")
def _split(graph, inputs, parameters, avals):
    sizes, axis = graph.axes(parameters["sizes"]), int(parameters["axis"])
    names = graph.node("Split", graph.whole(inputs[0]), sizes, outputs=len(avals), axis=axis)
    names = [names] if len(avals) == 1 else names
    return [result(name, aval) for name, aval in zip(names, avals, strict=True)]


@emits("tile")
def _tile(graph, inputs, parameters, avals):
    if set(parameters["reps"]) == {1}:
        return inputs
    node = graph.node("Tile", graph.whole(inputs[0]), graph.axes(parameters["reps"]))
    return [result(node, avals[0])]


@emits("slice")
def _slice(graph, inputs, parameters, avals):
    (x,) = inputs
    starts, ends = parameters["start_indices"], parameters["limit_indices"]
    steps = parameters["strides"] or (1,) * len(starts)
    cut = [
        i
        for i, side in enumerate(x.shape)
        if (starts[i], steps[i]) != (0, 1) or (ends[i] is not side and ends[i] != side)
    ]
    limits = [ends[i] if is_static((ends[i],)) else _LAST for i in cut]
    bounds = ([starts[i] for i in cut], limits, cut, [steps[i] for i in cut])
    return [result(graph.node("Slice", graph.whole(x), *map(graph.axes, bounds)), avals[0])]


@emits("pad")
def _pad(graph, inputs, parameters, avals):
    low, high, inner = zip(*parameters["padding_config"], strict=True)
    if any(inner) or min((*low, *high)) < 0:
        raise Unsupported("--format=onnx: padding between elements, or of fewer than 0")
    x, value = map(graph.whole, inputs)
    return [result(graph.node("Pad", x, graph.axes([*low, *high]), value), avals[0])]


@emits("iota")
def _iota(graph, inputs, parameters, avals):
    (aval,), place = avals, parameters["dimension"]
    shape = [1] * len(aval.shape)
    shape[place] = int(aval.shape[place])
    array = np.arange(shape[place], dtype=aval.dtype).reshape(shape)
    return [Tensor(aval.shape, array.dtype, tuple(shape), constant=array)]


@emits("cumsum")
def _cumsum(graph, inputs, parameters, avals):
    axis = graph.store(np.array(parameters["axis"], np.int64))
    node = graph.node("CumSum", graph.whole(inputs[0]), axis, reverse=int(parameters["reverse"]))
    return [result(node, avals[0])]


def _reduction(name: str, kind: str) -> None:
    @emits(name)
    def emit(graph, inputs, parameters, avals):
        x, axes = graph.whole(inputs[0]), graph.axes(parameters["axes"])
        logical = avals[0].dtype == bool
        if logical:
            x = graph.node("Cast", x, to=graph.elem_type(np.int32))
        node = graph.node(kind, x, axes, keepdims=0)
        if logical:
            node = graph.node("Cast", node, to=graph.elem_type(bool))
        return [result(node, avals[0])]


for _name, _kind in _REDUCTIONS.items():
    _reduction(_name, _kind)


@emits("top_k")
def _top_k(graph, inputs, parameters, avals):
    axis = int(parameters.get("axis", len(inputs[0].shape) - 1))
    k = graph.axes([parameters["k"]])
    values, indices = graph.node("TopK", graph.whole(inputs[0]), k, outputs=2, axis=axis)
    indices = graph.node("Cast", indices, to=graph.elem_type(avals[1].dtype))
    return [result(values, avals[0]), result(indices, avals[1])]


@emits("sort")
def _sort(graph, inputs, parameters, avals):
    """By the first operand; TopK keeps the order of equal ones, as a stable sort does."""
    if parameters["num_keys"] != 1:
        raise Unsupported("--format=onnx: sorting by several keys")
    axis = int(parameters["dimension"])
    count, names = graph.axes([inputs[0].shape[axis]]), [graph.whole(one) for one in inputs]
    first, order = graph.node("TopK", names[0], count, outputs=2, axis=axis, largest=0)
    others = [graph.node("GatherElements", name, order, axis=axis) for name in names[1:]]
    return [result(name, aval) for name, aval in zip([first, *others], avals, strict=True)]
