"""An ONNX graph as it is written: nodes, constants (equal ones once) and tensors.

Broadcasts stay pending, as stored dimensions of 1, until an operation needs them written out: ONNX
broadcasts elementwise operations itself. The batch may be symbolic, as jax.export traces it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsct_jax.errors import UserError

OPSET = 18

Shape = tuple[Any, ...]


class Unsupported(UserError):
    """A primitive that has no translation."""


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
        self.symbol: Any = None  # the batch size where it is symbolic, and its name in the graph
        self.batch = ""

    def elem_type(self, dtype: np.dtype) -> int:
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

    def axes(self, values: Sequence[int]) -> str:
        """A constant vector."""
        return self.store(np.array(values, np.int64))
