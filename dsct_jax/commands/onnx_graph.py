"""An ONNX graph as it is written: nodes, constants (equal ones once) and tensors.

Broadcasts stay pending, as stored dimensions of 1, until an operation needs them written out: ONNX
broadcasts elementwise operations itself. The batch is symbolic, as jax.export traces it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsct_jax.errors import UserError

OPSET = 18

Shape = tuple[Any, ...]


class Unsupported(UserError):
    """A primitive that has no translation."""


@dataclasses.dataclass(frozen=True)
class Convolution:
    """One of an NHWC map, with what its result is multiplied by and what is added to it."""

    x: str  # NCHW
    kernel: np.ndarray  # (out, in, height, width)
    bias: np.ndarray  # (out)
    attributes: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value of the graph."""

    shape: Shape  # as JAX knows it; one entry may be symbolic
    dtype: np.dtype
    stored: Shape  # the same, or 1 where a broadcast is pending
    name: str = ""
    constant: np.ndarray | None = None  # of shape `stored`, instead of a name


def is_static(shape: Shape) -> bool:
    return all(isinstance(side, int | np.integer) for side in shape)


class Graph:
    """Nodes and constants in the order of the program."""

    def __init__(self, onnx: Any):
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: dict[tuple[Any, ...], str] = {}
        self.initializers: list[Any] = []
        self.symbol: Any = None  # the batch size in shapes, and its name in the graph
        self.batch = ""
        self.convolutions: dict[str, Convolution] = {}  # by the name of their result
        self.maps: dict[str, Tensor] = {}  # by the name of the same as a matrix, pixels by channels

    def elem_type(self, dtype: Any) -> int:
        """ONNX's number of a type."""
        return self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def store(self, array: Any) -> str:
        """Name of a constant, the same for equal ones."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self.constants:
            name = self.constants[key] = f"constant_{len(self.constants)}"
            self.initializers.append(self.onnx.numpy_helper.from_array(array, name))
        return self.constants[key]

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds an operation; name of its result, or names of several."""
        names = [f"{kind.lower()}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def convolve(self, what: Convolution) -> str:
        """Name of its result, an NHWC map."""
        constants = map(self.store, (what.kernel, what.bias))
        node = self.node("Conv", what.x, *constants, **what.attributes)
        name = self.node("Transpose", node, perm=[0, 2, 3, 1])
        self.convolutions[name] = what
        return name

    def used(self, outputs: Sequence[str]) -> tuple[list[Any], list[Any]]:
        """The nodes and constants that the outputs need."""
        wanted, nodes = set(outputs), []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                nodes.append(node)
                wanted |= set(node.input)
        return nodes[::-1], [one for one in self.initializers if one.name in wanted]

    def ref(self, tensor: Tensor) -> str:
        """Its name, with broadcasts still pending."""
        return tensor.name if tensor.constant is None else self.store(tensor.constant)

    def whole(self, tensor: Tensor) -> str:
        """Its name, written out in its whole shape."""
        if tensor.stored == tensor.shape:
            return self.ref(tensor)
        if tensor.constant is not None and is_static(tensor.shape):
            return self.store(np.broadcast_to(tensor.constant, tensor.shape))
        return self.node("Expand", self.ref(tensor), self.sizes(tensor.shape))

    def sizes(self, shape: Shape) -> str:
        """Name of a shape as a vector, to expand to."""
        if is_static(shape):
            return self.store(np.array(shape, np.int64))
        parts = []
        for side in shape:
            static = isinstance(side, int | np.integer)
            factor = self.axes([int(side if static else side // self.symbol)])
            parts.append(factor if static else self.node("Mul", self.batch, factor))
        return self.node("Concat", *parts, axis=0)

    def reshape(self, name: str, shape: Shape) -> str:
        """Of a whole tensor; the symbolic dimension is what is left."""
        wanted = [side if isinstance(side, int | np.integer) else -1 for side in shape]
        if wanted.count(-1) > 1:
            raise Unsupported(f"--format=onnx: cannot reshape to {shape}: two unknown dimensions")
        return self.node("Reshape", name, self.store(np.array(wanted, np.int64)))

    def axes(self, values: Sequence[Any]) -> str:
        """A constant vector."""
        return self.store(np.array(values, np.int64))


# (graph, arguments, the equation's parameters, abstract results) -> results
Emit = Callable[[Graph, list[Tensor], Any, list[Any]], list[Tensor]]
EMIT: dict[str, Emit] = {}  # by the name of JAX's primitive


def emits(*names: str) -> Callable[[Emit], Emit]:
    """Registers what writes the operations for these primitives."""

    def register(function: Emit) -> Emit:
        EMIT.update(dict.fromkeys(names, function))
        return function

    return register


def result(name: str, aval: Any, stored: Shape | None = None) -> Tensor:
    """The tensor of that name and abstract value."""
    return Tensor(aval.shape, np.dtype(aval.dtype), aval.shape if stored is None else stored, name)
