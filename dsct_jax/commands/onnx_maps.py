"""Products, convolutions, pooling and look-ups as ONNX operations. Maps are NHWC for JAX and NCHW
for ONNX: each operation turns them, and runtimes take out the turns that cancel.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from dsct_jax.commands.onnx_graph import Convolution, Graph, Tensor, Unsupported, emits, result


def in_convolution(graph: Graph, name: str, inputs: list[Tensor]) -> str | None:
    """A convolution's result times or plus a value per channel, as a convolution: a frozen norm."""
    if name not in ("mul", "add") or inputs[0].name not in graph.convolutions:
        return None
    x, values = inputs
    if values.constant is None or values.constant.size not in (1, x.shape[-1]):
        return None
    if values.stored and values.constant.size != 1 and values.stored[-1] != x.shape[-1]:
        return None
    before = graph.convolutions[x.name]
    row = np.broadcast_to(values.constant.reshape(-1), before.bias.shape)
    if name == "add":
        return graph.convolve(dataclasses.replace(before, bias=before.bias + row))
    kernel, bias = before.kernel * row[:, None, None, None], before.bias * row
    return graph.convolve(dataclasses.replace(before, kernel=kernel, bias=bias))


@emits("dot_general")
def _dot(graph, inputs, parameters, avals):
    (contract, batch), (aval,) = parameters["dimension_numbers"], avals
    kernel = inputs[1].constant
    if inputs[0].name in graph.maps and kernel is not None and kernel.ndim == 2:
        return [_matrix_of_map(graph, graph.maps[inputs[0].name], kernel, aval)]
    sides, free = [], []
    for x, summed, kept, is_left in zip(inputs, contract, batch, (True, False), strict=True):
        rest = [i for i in range(len(x.shape)) if i not in (*summed, *kept)]
        order = [*kept, *rest, *summed] if is_left else [*kept, *summed, *rest]
        name = graph.whole(x)
        if order != sorted(order):
            if x.constant is not None:
                name = graph.store(x.constant.transpose(order))
            else:
                name = graph.node("Transpose", name, perm=list(map(int, order)))
        if len(rest) != 1 or len(summed) != 1:  # to matrices
            shape = [x.shape[i] for i in kept]
            parts = [math.prod(x.shape[i] for i in group) for group in (rest, summed)]
            name = graph.reshape(name, (*shape, *(parts if is_left else parts[::-1])))
        sides.append(name)
        free.append(rest)
    node = graph.node("MatMul", *sides)
    if any(len(rest) != 1 for rest in free) or any(len(one) != 1 for one in contract):
        node = graph.reshape(node, aval.shape)
    return [result(node, aval)]


def _matrix_of_map(graph: Graph, x: Tensor, kernel: np.ndarray, aval: Any) -> Tensor:
    """A map's pixels times a matrix: a 1x1 convolution, which runtimes fuse with its neighbors."""
    nchw = graph.node("Transpose", graph.ref(x), perm=[0, 3, 1, 2])
    bias = np.zeros(kernel.shape[1], kernel.dtype)
    name = graph.convolve(Convolution(nchw, kernel.T[:, :, None, None], bias, {}))
    shape = (*x.shape[:3], kernel.shape[1])
    matrix = result(graph.reshape(name, aval.shape), aval)
    graph.maps[matrix.name] = Tensor(shape, matrix.dtype, shape, name)
    return matrix


@emits("conv_general_dilated")
def _conv(graph, inputs, parameters, avals):
    numbers = parameters["dimension_numbers"]
    nhwc = numbers.lhs_spec == numbers.out_spec == (0, 3, 1, 2)
    if not nhwc or set(parameters["lhs_dilation"]) != {1} or parameters["batch_group_count"] != 1:
        raise Unsupported("--format=onnx: a convolution other than of NHWC maps")
    x = graph.node("Transpose", graph.whole(inputs[0]), perm=list(numbers.lhs_spec))
    kernel = inputs[1].constant
    if kernel is None:
        raise Unsupported("--format=onnx: a convolution with a computed kernel")
    low, high = zip(*parameters["padding"], strict=True)
    attributes = {
        "strides": list(map(int, parameters["window_strides"])),
        "pads": list(map(int, (*low, *high))),
        "dilations": list(map(int, parameters["rhs_dilation"])),
        "group": int(parameters["feature_group_count"]),
    }
    kernel = kernel.transpose(numbers.rhs_spec)
    bias = np.zeros(len(kernel), kernel.dtype)
    return [result(graph.convolve(Convolution(x, kernel, bias, attributes)), avals[0])]


@emits("reduce_window_max")
def _max_pool(graph, inputs, parameters, avals):
    """Of NHWC maps."""
    low, high = zip(*parameters["padding"][1:3], strict=True)
    x = graph.node("Transpose", graph.whole(inputs[0]), perm=[0, 3, 1, 2])
    node = graph.node(
        "MaxPool",
        x,
        kernel_shape=list(map(int, parameters["window_dimensions"][1:3])),
        strides=list(map(int, parameters["window_strides"][1:3])),
        pads=list(map(int, (*low, *high))),
    )
    return [result(graph.node("Transpose", node, perm=[0, 2, 3, 1]), avals[0])]


@emits("grid_sample")
def _grid_sample(graph, inputs, parameters, avals):
    """`pallas_kernels.grid_sample`."""
    names = map(graph.whole, inputs)
    how = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": 0}
    return [result(graph.node("GridSample", *names, **how), avals[0])]


@emits("gather")
def _gather(graph, inputs, parameters, avals):
    """Whole slices by indices, of one or several dimensions, for each entry of a batch."""
    numbers, (x, indices), (aval,) = parameters["dimension_numbers"], inputs, avals
    indexed, batched = list(numbers.start_index_map), list(numbers.operand_batching_dims)
    others = [i for i in range(len(x.shape)) if i not in (*indexed, *batched)]
    sizes = parameters["slice_sizes"]
    if indices.constant is not None and indices.constant.ndim == 1:  # as JAX slices, batch unknown
        starts = [int(start) for start in indices.constant]
        ends = [start + sizes[i] for start, i in zip(starts, indexed, strict=True)]
        bounds = map(graph.axes, (starts, ends, indexed))
        return [
            result(graph.reshape(graph.node("Slice", graph.whole(x), *bounds), aval.shape), aval)
        ]
    if not all(sizes[i] == (1 if i in indexed else x.shape[i]) for i in indexed + others):
        raise Unsupported(f"--format=onnx: a gather of parts of slices ({sizes} of {x.shape})")
    name = graph.whole(indices)
    if parameters["mode"] == GatherScatterMode.CLIP:
        last = np.array([x.shape[i] - 1 for i in indexed], indices.dtype)
        name = graph.node("Max", name, graph.store(np.zeros_like(last)))
        name = graph.node("Min", name, graph.store(last))
    name = graph.node("Cast", name, to=graph.elem_type(np.int64))
    of_batch = list(numbers.start_indices_batching_dims)
    rest = [i for i in range(len(indices.shape) - 1) if i not in of_batch]
    order = [*of_batch, *rest, len(indices.shape) - 1]
    if order != sorted(order):
        name = graph.node("Transpose", name, perm=order)
    data, order = graph.whole(x), [*batched, *indexed, *others]
    if order != sorted(order):
        data = graph.node("Transpose", data, perm=order)
    node = graph.node("GatherND", data, name, batch_dims=len(batched))
    # now [batched, rest of the indices, others]; JAX puts the others at `offset_dims`, and indexed
    # ones that are not collapsed, of which one is left
    kept = [i for i in range(len(x.shape)) if i not in (*numbers.collapsed_slice_dims, *batched)]
    place = dict(zip(kept, numbers.offset_dims, strict=True))
    first = [i for i in range(len(aval.shape)) if i not in numbers.offset_dims]
    now = [first[i] for i in (*of_batch, *rest)] + [place[i] for i in others]
    if now != sorted(now):
        node = graph.node("Transpose", node, perm=np.argsort(now).tolist())
    if len(now) < len(aval.shape):
        node = graph.reshape(node, aval.shape)
    return [result(node, aval)]
