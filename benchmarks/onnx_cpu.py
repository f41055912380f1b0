"""The full R50 network written as ONNX: how long that takes, how large the file is, how far its
answers are from ours, and how fast onnxruntime and OpenVINO run it beside our own forward pass.

    python -m benchmarks.onnx_cpu --output=benchmarks/onnx_cpu

Float32, random weights, 480x640, 2 threads each; the runs take turns in one process. OpenVINO is
measured where it is installed (pip install openvino).
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # read where jax is imported
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads=2"

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from benchmarks.tables import hardware, make_parser, report, table
from configs.emotic_r50 import get_config
from dsct_jax.commands.onnx_export import OUTPUTS, onnx_session, write_onnx
from dsct_jax.config import to_builtins
from dsct_jax.inference.load import Model, model_config
from dsct_jax.model.build import Network

SIZE, THREADS = (480, 640), 2
Answer = tuple[np.ndarray, np.ndarray]


def noise(batch: int) -> Answer:
    """Images and their padding, of which there is some."""
    images = np.random.default_rng(batch).standard_normal((batch, *SIZE, 3), np.float32)
    mask = np.zeros((batch, *SIZE), bool)
    mask[:, :, 600:] = True
    return images, mask


def openvino_session(path: Path) -> Callable[[np.ndarray, np.ndarray], Answer]:
    """Both inputs -> (logits, boxes), computed by OpenVINO from the file in float32."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)

    def run(*inputs: np.ndarray) -> Answer:
        answer = compiled(inputs)
        return tuple(answer[name] for name in OUTPUTS)

    return run


def main() -> None:
    """Measures, prints the table, and writes it with the raw numbers."""
    parser = make_parser("benchmarks.onnx_cpu", __doc__)
    parser.add_argument("--runs", type=int, default=7, help="of each, taking turns")
    arguments = parser.parse_args()
    config = to_builtins(get_config())
    network = Network(model_config(config))
    model = Model(network, *network.init(0), config)

    def ours(*inputs: np.ndarray) -> Answer:
        answer = jax.device_get(model(*inputs))
        return answer.logits[-1], answer.boxes[-1]

    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder, "model.onnx"), time.perf_counter()
        write_onnx(model, path, SIZE, notes={})
        seconds, megabytes = time.perf_counter() - start, path.stat().st_size / 1e6
        sessions = {"ours": ours, "onnxruntime": onnx_session(path, threads=THREADS)}
        if importlib.util.find_spec("openvino"):
            sessions["OpenVINO"] = openvino_session(path)
        expected = {batch: ours(*noise(batch)) for batch in (1, 3)}
        apart = {
            name: max(
                float(np.abs(a - b).max())
                for batch, answer in expected.items()
                for a, b in zip(run(*noise(batch)), answer, strict=True)
            )
            for name, run in sessions.items()
        }
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(arguments.runs):
            for name, run in sessions.items():
                start = time.perf_counter()
                run(*noise(1))
                times[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        (
            name,
            f"{middle[name]:.2f} ({min(values):.2f} to {max(values):.2f})",
            f"{middle[name] / middle['ours']:.2f}",
            f"{apart[name]:.1e}",
        )
        for name, values in times.items()
    ]
    columns = "run by", "seconds, median (min to max)", "of ours", "largest difference, batch 1, 3"
    where = f"{hardware()['device']}, jax {jax.__version__}, {THREADS} threads"
    title = f"R50, {SIZE[0]}x{SIZE[1]}, batch 1, float32 ({where})"
    written = f"{title}; written in {seconds:.0f} s, {megabytes:.0f} MB"
    numbers = {"seconds": times, "difference": apart, "writing_s": seconds, "mb": megabytes}
    report(f"{written}\n\n{table(columns, rows)}", numbers, arguments.output)


if __name__ == "__main__":
    main()
