"""The network as an ONNX graph of opset 18, deformable attention as GridSample."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax import export

from dsct_jax.commands.onnx_graph import OPSET, Graph, Tensor
from dsct_jax.commands.onnx_operations import translate
from dsct_jax.errors import UserError
from dsct_jax.inference.load import Model
from dsct_jax.preprocess import Size

OUTPUTS = ("logits", "boxes")
_INSTALL = "pip install 'dsct-jax[onnx]' (docs/weights.md)"


def write_onnx(model: Model, path: Path, size: Size, *, notes: dict[str, str]) -> None:
    """Writes the network for any number of float32 images [batch height width 3] and their padding,
    with `notes` as metadata. Raises UserError when onnx is not installed, or the network uses what
    cannot be written.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError(f"--format=onnx needs {error.name}: {_INSTALL}") from None

    def forward(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        network = model.functions.bind(model.params, model.norm_stats)
        predictions = network(*inputs, implementation="grid_sample")
        return predictions.logits[-1], predictions.boxes[-1]

    graph = Graph(onnx)
    (graph.symbol,) = export.symbolic_shape("batch")
    named = model.functions.input_specs(graph.symbol, size)
    program = jax.make_jaxpr(forward)(*named.values())
    inputs = [
        Tensor(spec.shape, np.dtype(spec.dtype), spec.shape, name) for name, spec in named.items()
    ]
    sizes = graph.node("Shape", inputs[0].name)
    graph.batch = graph.node("Slice", sizes, graph.axes([0]), graph.axes([1]))
    results = translate(graph, program.jaxpr, program.consts, inputs)
    for name, result in zip(OUTPUTS, results, strict=True):
        graph.nodes.append(onnx.helper.make_node("Identity", [graph.whole(result)], [name]))

    def about(name: str, tensor: Tensor):
        shape = [side if isinstance(side, int) else str(side) for side in tensor.shape]
        return onnx.helper.make_tensor_value_info(name, graph.elem_type(tensor.dtype), shape)

    given = [about(tensor.name, tensor) for tensor in inputs]
    made = [about(name, result) for name, result in zip(OUTPUTS, results, strict=True)]
    nodes, constants = graph.used(OUTPUTS)
    body = onnx.helper.make_graph(nodes, "dsct", given, made, constants)
    opset = [onnx.helper.make_opsetid("", OPSET)]
    written = onnx.helper.make_model(body, opset_imports=opset, ir_version=9)
    onnx.helper.set_model_props(written, dict(sorted(notes.items())))
    onnx.checker.check_model(written)
    path.write_bytes(written.SerializeToString(deterministic=True))


def onnx_session(
    path: Path, *, threads: int = 0
) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Both inputs -> (logits, boxes), computed by onnxruntime from the file on the CPU, with that
    many threads (0: one per physical core).
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"--format=onnx is checked with onnxruntime: {_INSTALL}") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda *inputs: tuple(session.run(list(OUTPUTS), dict(zip(names, inputs, strict=True))))
