"""A trained model for use elsewhere: StableHLO for any process with jax, safetensors, a .pth for
the authors' code, ONNX.

    python -m dsct_jax export --checkpoint=runs/demo --output=exported --format=stablehlo [--sizes=96x136,136x96]

stablehlo    model_HxW.stablehlo (a jax.export artifact for cpu, cuda and tpu, any batch size), weights.npz and model.json; examples/run_exported.py
             runs it with jax and numpy alone
safetensors  model.safetensors: weights, configuration and class names; `dsct_jax.load` reads it
torch        model.pth with the released names, for the authors' code and for torch.load(weights_only=True); needs no PyTorch
onnx         model_HxW.onnx for batches of --batch-size (needs the onnx extra)

What was written is read again and compared with the checkpoint before the command says done. The
moving average of the weights is exported where the run kept one. The same checkpoint gives the same
bytes.
"""

import argparse
import contextlib
import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from dsct_jax.cli import Parser, run_command, writing
from dsct_jax.commands import onnx_export
from dsct_jax.config import read_config
from dsct_jax.errors import UserError
from dsct_jax.inference.load import Model, load
from dsct_jax.preprocess import MEAN, STD, Size
from dsct_jax.weights.rules import DSCT, has_rule, to_torch
from dsct_jax.weights.tensor_files import write_npz, write_pth

FORMATS = ("stablehlo", "safetensors", "torch", "onnx")
WEIGHTS = "weights.npz"
PLATFORMS = ("cpu", "cuda", "tpu")
# largest difference of a logit or a box coordinate between what was written and the checkpoint,
# float32
TOLERANCE = 1e-4
_TIMED_CALLS = 5

Answer = tuple[
    np.ndarray, np.ndarray
]  # logits [b q k+1] and boxes [b q 4] of the last decoder layer
Run = Callable[[np.ndarray, np.ndarray], Answer]


def export(
    model: Model, output: Path, *, format: str, sizes: Sequence[Size] = (), batch_size: int = 1
) -> list[str]:
    """Writes `model` into the directory `output`, reads it again, compares; returns the lines of
    the report.

    Args:
        format: one of FORMATS.
        sizes: (height, width) of the canvases, for stablehlo and onnx; empty = those of the model's
            own preprocessing.
        batch_size: images a call, for onnx only; stablehlo takes any number.

    Raises:
        UserError: the format cannot express this model or is unknown, or what was written does not
            give the checkpoint's answers, in which case nothing is left in `output`.
    """
    if format not in FORMATS:
        raise UserError(f"--format={format}: none of {', '.join(FORMATS)}")
    sizes = tuple(sizes) or model.preprocessing.buckets
    notes = description(model, sizes)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".unfinished-") as name:
        directory = Path(name)
        if format == "stablehlo":
            paths = write_stablehlo(model, directory, sizes, notes)
            report = [
                _checked(model, _stablehlo_run(path, directory / WEIGHTS), size, batch_size=2)
                for size, path in paths.items()
            ]
        elif format == "onnx":
            report = []
            for size in sizes:
                path = directory / _name(size, "onnx")
                onnx_export.write_onnx(
                    model, path, size, batch_size=batch_size, notes=_texts(notes)
                )
                report.append(
                    _checked(model, onnx_export.onnx_session(path), size, batch_size=batch_size)
                )
        elif format == "safetensors":
            model.save(directory / "model.safetensors", notes=_texts(notes))
            report = [_same_weights(model, load(directory / "model.safetensors"))]
        else:
            remarks = write_torch(model, directory / "model.pth", notes)
            report = [*remarks, _same_weights(model, load(directory / "model.pth"))]
        written = sorted(path.name for path in directory.iterdir())
        for file in written:
            shutil.move(directory / file, output / file)
    return [*report, f"written: {', '.join(str(output / file) for file in written)}"]


def description(model: Model, sizes: Sequence[Size]) -> dict[str, Any]:
    """What one must know to use the artifact, as JSON values: classes, thresholds, preprocessing,
    and how the outputs are to be read.
    """
    return {
        "class_names": list(model.class_names),
        "multi_label": model.multi_label,
        "subject_logit": model.decoder.subject_logit,
        "decoder": model.decoder.to_dict(),
        "preprocessing": {
            "mean": list(MEAN),
            "std": list(STD),
            "short_side": model.preprocessing.short_side,
            "max_long_side": model.preprocessing.max_long_side,
            "sizes": [list(size) for size in sizes],
            "steps": "RGB, resized (antialiased bilinear), (pixel / 255 - mean) / std, padded at the right and below with 0; mask True = padding",
        },
        "inputs": {"images": "float32 [b height width 3]", "padding_mask": "bool [b height width]"},
        "outputs": {
            "logits": "float32 [b queries classes+1]; probability = sigmoid (multi_label) or softmax of all but the last; the last says `a person`",
            "boxes": "float32 [b queries 4]: (cx, cy, width, height) in 0..1 of the image without padding",
        },
        "config": model.config,
    }


def _texts(notes: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: json.dumps(value, sort_keys=True)
        for name, value in notes.items()
        if value is not None
    }


def write_stablehlo(
    model: Model, directory: Path, sizes: Sequence[Size], notes: Mapping[str, Any]
) -> dict[Size, Path]:
    """Writes an artifact for each size, the weights that all of them take, and model.json; returns
    where the artifacts are.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("--format=stablehlo needs flatbuffers: pip install 'dsct-jax[export]'")
    weights, functions = model.arrays(), model.functions
    write_npz(directory / WEIGHTS, weights)

    def forward(
        weights: dict[str, jax.Array], images: jax.Array, padding_mask: jax.Array
    ) -> dict[str, jax.Array]:
        params, norm_stats = (
            {name: weights[f"{part}/{name}"] for name in names} for part, names in parts.items()
        )
        predictions = functions.bind(params, norm_stats)(images, padding_mask, implementation="xla")
        return {"logits": predictions.logits[-1], "boxes": predictions.boxes[-1]}

    parts = {"params": list(model.params), "frozen": list(model.norm_stats)}
    weight_specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    paths = {size: directory / _name(size, "stablehlo") for size in sizes}
    for size, path in paths.items():
        (b,) = jax.export.symbolic_shape("b")
        specs = (
            jax.ShapeDtypeStruct((b, *size, 3), jnp.float32),
            jax.ShapeDtypeStruct((b, *size), jnp.bool_),
        )
        with _without_source_places():
            path.write_bytes(
                jax.export.export(jax.jit(forward), platforms=PLATFORMS)(
                    weight_specs, *specs
                ).serialize()
            )
    artifacts = {"x".join(map(str, size)): path.name for size, path in paths.items()}
    document = {"artifacts": artifacts, "weights": WEIGHTS, "platforms": list(PLATFORMS), **notes}
    (directory / "model.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    return paths


def _stablehlo_run(path: Path, weights_path: Path) -> Run:
    """The artifact as read from its files."""
    with np.load(weights_path) as file:
        weights = jax.device_put(dict(file))
    call = jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)

    def run(images: np.ndarray, mask: np.ndarray) -> Answer:
        answer = call(weights, images, mask)
        return np.asarray(answer["logits"]), np.asarray(answer["boxes"])

    return run


@contextlib.contextmanager
def _without_source_places() -> Iterator[None]:
    """Leaves out where on this machine the code lies: the bytes depend on the model alone."""
    before = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def write_torch(model: Model, path: Path, notes: Mapping[str, Any]) -> list[str]:
    """Writes the released layout; returns what the user should know. Raises UserError when the
    authors' code has no such model.
    """
    require_released_form(model)
    config = model.functions.config
    write_pth(
        path,
        to_torch(model.params | model.norm_stats, num_decoder_layers=config.num_decoder_layers),
        _texts(notes),
    )
    if (config.fusion, config.semantic_selection) == ("released", "largest"):
        return []
    ours = f"fusion={config.fusion}, semantic_selection={config.semantic_selection}"
    return [
        f"note: trained with {ours}; the authors' code loads it, but computes fusion=released, "
        "semantic_selection=largest"
    ]


def require_released_form(model: Model) -> None:
    """Raises UserError when the authors' code has no such model."""
    config = model.functions.config
    if config.norm != "frozen_batch":
        raise UserError(
            "--format=torch: the authors' code knows config.model.norm=frozen_batch only, this "
            f"model has {config.norm}"
        )
    if config.box_refinement:
        raise UserError(
            "--format=torch: the authors' code has no box refinement (config.model.box_refinement)"
        )
    if nameless := [path for path in model.params if not has_rule(path, DSCT)]:
        raise UserError(
            f"--format=torch: the authors' code has no {nameless[0]} "
            f"(config.model.reweighting={config.reweighting})"
        )


def _name(size: Size, suffix: str) -> str:
    return f"model_{size[0]}x{size[1]}.{suffix}"


def _same_weights(model: Model, written: Model) -> str:
    """Compares every number of two models; raises UserError unless they are the same bit for bit."""
    expected, found = model.arrays(), written.arrays()
    if different := [
        name for name in expected if expected[name].tobytes() != found[name].tobytes()
    ]:
        largest = max(float(np.abs(expected[name] - found[name]).max()) for name in different)
        raise UserError(
            f"what was written differs from the checkpoint by {largest:.2g} ({different[0]}); "
            "nothing was kept"
        )
    return f"largest difference to the checkpoint: 0 in {sum(x.size for x in expected.values()):,} numbers of {len(expected)} arrays"


def _checked(model: Model, run: Run, size: Size, *, batch_size: int) -> str:
    """Compares `run` with the live model on padded noise and times both; raises UserError when they
    differ.
    """

    def live(images: np.ndarray, mask: np.ndarray) -> Answer:
        predictions = model(images, mask)
        return np.asarray(predictions.logits[-1]), np.asarray(predictions.boxes[-1])

    images, mask = _noise(size, batch_size)
    largest = [
        float(np.abs(a - b).max())
        for a, b in zip(run(images, mask), live(images, mask), strict=True)
    ]
    if not max(largest) <= TOLERANCE:
        raise UserError(
            f"{size[0]}x{size[1]}: what was written differs from the checkpoint by "
            f"{max(largest):.2g}; nothing was kept"
        )
    milliseconds = _interleaved(
        {"exported": lambda: run(images, mask), "live": lambda: live(images, mask)}
    )
    speed = ", ".join(f"{name} {value:.1f} ms" for name, value in milliseconds.items())
    differences = (
        f"largest difference to the checkpoint: logits {largest[0]:.2g}, boxes {largest[1]:.2g}"
    )
    return f"{size[0]}x{size[1]}: {differences}; batch of {batch_size} on {jax.default_backend()}: {speed}"


def _noise(size: Size, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images whose right and lower parts are padding, each another part."""
    height, width = size
    images = np.random.default_rng(0).standard_normal((batch_size, height, width, 3), np.float32)
    mask = np.zeros((batch_size, height, width), bool)
    for i in range(batch_size):
        mask[i, height - i * height // 8 :], mask[i, :, width - (i % 3) * width // 6 :] = True, True
    images[mask] = 0
    return images, mask


def _interleaved(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Least milliseconds of each call, taken in turns."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(_TIMED_CALLS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], 1000 * (time.perf_counter() - start))
    return best


def parse_sizes(text: str) -> tuple[Size, ...]:
    """'96x136,136x96' -> ((96, 136), (136, 96))."""
    sizes = []
    for part in text.split(","):
        height, _, width = part.partition("x")
        if not (height.isdigit() and width.isdigit() and min(int(height), int(width)) >= 32):
            raise UserError(
                f"--sizes={text}: {part!r} is no HEIGHTxWIDTH of at least 32 pixels, such as "
                "800x1344"
            )
        sizes.append((int(height), int(width)))
    return tuple(sizes)


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog="python -m dsct_jax export", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="run directory, .safetensors file, or released .pth (with --config)",
    )
    parser.add_argument("--output", type=Path, required=True, help="directory for what is written")
    parser.add_argument("--format", required=True, help=" | ".join(FORMATS))
    parser.add_argument(
        "--sizes",
        help="stablehlo, onnx: canvases as HEIGHTxWIDTH,...; left out: those the model was "
        "evaluated with",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="onnx: images a call")
    parser.add_argument(
        "--config",
        type=Path,
        help="configuration (.py or .json) that describes the weights; needed for the authors' "
        ".pth only",
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """The command with its arguments parsed. Raises UserError for what cannot be used."""
    sizes = () if arguments.sizes is None else parse_sizes(arguments.sizes)
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size={arguments.batch_size} must be at least 1")
    model = load(
        arguments.checkpoint, None if arguments.config is None else read_config(arguments.config)
    )
    with writing(arguments.output):
        lines = export(
            model,
            arguments.output,
            format=arguments.format,
            sizes=sizes,
            batch_size=arguments.batch_size,
        )
    print("\n".join(lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; a user's mistake is one line on stderr and exit status 2."""
    return run_command(lambda: run(make_parser().parse_args(argv)))
