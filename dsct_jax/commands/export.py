"""A trained model for use elsewhere: StableHLO for any process with jax, safetensors, a .pth for
the authors' code, ONNX."""

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
import numpy as np

from dsct_jax.commands import onnx_export
from dsct_jax.commands.flags import load_model
from dsct_jax.commands.parsers import FORMATS
from dsct_jax.crops import PIXELS
from dsct_jax.errors import UserError
from dsct_jax.inference.load import Model, load
from dsct_jax.preprocess import MEAN, STD, Size
from dsct_jax.weights.layouts import layout_of
from dsct_jax.weights.rules import has_rule, to_torch
from dsct_jax.weights.tensor_files import write_npz, write_pth

WEIGHTS = "weights.npz"
PLATFORMS = ("cpu", "cuda", "tpu")
# of a logit or a box coordinate, between what was written and the checkpoint, float32
TOLERANCE = 1e-4
_CHECKED_IMAGES = 2
_TIMED_CALLS = 5

Answer = tuple[np.ndarray, np.ndarray]  # logits [b q k+1], boxes [b q 4] of the last decoder layer
Run = Callable[[np.ndarray, np.ndarray], Answer]


def export(model: Model, output: Path, *, format: str, sizes: Sequence[Size] = ()) -> list[str]:
    """Writes `model` into the directory `output` in one of FORMATS, reads it again, compares;
    returns the lines of the report. For stablehlo and onnx one file is written per canvas of
    `sizes` (empty = the model's own).

    Raises:
        UserError: the format cannot express this model or is unknown, or what was written does not
            give the checkpoint's answers, in which case nothing is left in `output`.
    """
    if format not in FORMATS:
        raise UserError(f"--format={format}: must be one of {', '.join(FORMATS)}")
    own = model.crops.canvases if model.crops else model.preprocessing.buckets
    sizes = tuple(sizes) or own
    notes, report = description(model, sizes), []
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".unfinished-") as name:
        directory = Path(name)
        if format == "stablehlo":
            for size, path in write_stablehlo(model, directory, sizes, notes).items():
                run = _stablehlo_run(path, directory / WEIGHTS)
                report.append(_checked(model, run, size))
        elif format == "onnx":
            for size in sizes:
                path, texts = directory / "model_{}x{}.onnx".format(*size), _texts(notes)
                onnx_export.write_onnx(model, path, size, notes=texts)
                run = onnx_export.onnx_session(path)
                report.append(_checked(model, run, size))
        else:
            path = directory / ("model.safetensors" if format == "safetensors" else "model.pth")
            if format == "safetensors":
                model.save(path, notes=_texts(notes))
            else:
                report += write_torch(model, path, notes)
            report.append(_same_weights(model, load(path)))
        written = sorted(path.name for path in directory.iterdir())
        for file in written:
            shutil.move(directory / file, output / file)
    return [*report, f"written: {', '.join(str(output / file) for file in written)}"]


def description(model: Model, sizes: Sequence[Size]) -> dict[str, Any]:
    """What one must know to use the artifact, as JSON values."""
    preprocessing = {
        "mean": list(MEAN),
        "std": list(STD),
        "short_side": model.preprocessing.short_side,
        "max_long_side": model.preprocessing.max_long_side,
        "sizes": [list(size) for size in sizes],
        "steps": "RGB, resized (antialiased bilinear), (pixel / 255 - mean) / std, padded at the "
        "right and below with 0; mask True = padding",
    }
    if model.crops:
        of_both = dict(zip(("images", "subjects"), PIXELS[model.crops.pixels], strict=True))
        steps = "RGB, cut as dsct_jax.crops.cut_crops does with the config's fields, (pixel / 255 "
        steps += "- mean) / std; images: the context of each person, subjects: the person"
        preprocessing = {"mean_and_std": of_both, "sizes": preprocessing["sizes"], "steps": steps}
    inputs = {"images": "float32 [b height width 3]", "padding_mask": "bool [b height width]"}
    if model.crops:
        inputs = {"images": inputs["images"], "subjects": "float32 [b side side 3]"}
    outputs = {
        "logits": "float32 [b queries classes+1]; probability = sigmoid (multi_label) or softmax "
        "of all but the last; the last says `a person`",
        "boxes": "float32 [b queries 4]: (cx, cy, width, height) in 0..1 of the image without "
        "padding",
    }
    return {
        "class_names": list(model.class_names),
        "multi_label": model.multi_label,
        "subject_logit": model.decoder.subject_logit,
        "decoder": model.decoder.to_dict(),
        "preprocessing": preprocessing,
        "inputs": inputs,
        "outputs": outputs,
        "config": model.config,
    }


def _texts(notes: Mapping[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value, sort_keys=True) for name, value in notes.items()}


def write_stablehlo(
    model: Model, directory: Path, sizes: Sequence[Size], notes: Mapping[str, Any]
) -> dict[Size, Path]:
    """Writes an artifact per size, the weights of all, and model.json; returns the artifacts."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("--format=stablehlo needs flatbuffers: pip install 'dsct-jax[export]'")
    weights, functions = model.arrays(), model.functions
    write_npz(directory / WEIGHTS, weights)

    def forward(weights: dict[str, jax.Array], *inputs: jax.Array) -> Any:
        params = {name: weights[f"params/{name}"] for name in model.params}
        norm_stats = {name: weights[f"frozen/{name}"] for name in model.norm_stats}
        predictions = functions.bind(params, norm_stats)(*inputs, implementation="xla")
        return {"logits": predictions.logits[-1], "boxes": predictions.boxes[-1]}

    weight_specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    paths = {size: directory / "model_{}x{}.stablehlo".format(*size) for size in sizes}
    for size, path in paths.items():
        (b,) = jax.export.symbolic_shape("b")
        with _without_source_places():
            exported = jax.export.export(jax.jit(forward), platforms=PLATFORMS)
            inputs = functions.input_specs(b, size).values()
            path.write_bytes(exported(weight_specs, *inputs).serialize())
    artifacts = {"x".join(map(str, size)): path.name for size, path in paths.items()}
    document = {"artifacts": artifacts, "weights": WEIGHTS, "platforms": list(PLATFORMS), **notes}
    (directory / "model.json").write_text(
        json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
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
    """Writes the names of the authors' code, which must have such a model; returns remarks."""
    config = model.functions.config
    layout, weights = layout_of(config), model.params | model.norm_stats
    if layout is None:
        raise UserError(f"--format=torch: no other code has config.model.name={config.name}")
    layout.require_fields(config, "--format=torch")
    if nameless := [path for path in weights if not has_rule(path, layout)]:
        raise UserError(f"--format=torch: {layout.title} has no {nameless[0]}")
    tensors = to_torch(weights, layout=layout, repeats=getattr(config, layout.repeats, 1))
    write_pth(path, tensors, _texts(notes))
    if all(getattr(config, field) == value for field, value in layout.computes):
        return []
    ours = ", ".join(f"{field}={getattr(config, field)}" for field, _ in layout.computes)
    theirs = ", ".join(f"{field}={value}" for field, value in layout.computes)
    return [f"note: trained with {ours}; the authors' code loads it, but computes {theirs}"]


def _same_weights(model: Model, written: Model) -> str:
    """Compares every number of two models; raises UserError unless they agree bit for bit."""
    expected, found = model.arrays(), written.arrays()
    different = [name for name in expected if expected[name].tobytes() != found[name].tobytes()]
    if different:
        largest = max(float(np.abs(expected[name] - found[name]).max()) for name in different)
        raise _differs(f"{largest:.2g} ({different[0]})")
    count = sum(x.size for x in expected.values())
    return f"largest difference to the checkpoint: 0 in {count:,} numbers of {len(expected)} arrays"


def _differs(by: str) -> UserError:
    return UserError(f"what was written differs from the checkpoint by {by}; nothing was kept")


def _checked(model: Model, run: Run, size: Size) -> str:
    """Compares `run` with the live model on padded noise (UserError) and times both."""

    def live(images: np.ndarray, mask: np.ndarray) -> Answer:
        predictions = model(images, mask)
        return np.asarray(predictions.logits[-1]), np.asarray(predictions.boxes[-1])

    images, mask = _noise(model, size, _CHECKED_IMAGES)
    pairs = zip(run(images, mask), live(images, mask), strict=True)
    logits, boxes = (float(np.abs(a - b).max()) for a, b in pairs)
    where = f"{size[0]}x{size[1]}"
    if not max(logits, boxes) <= TOLERANCE:
        raise _differs(f"{max(logits, boxes):.2g} ({where})")
    best = {"exported": float("inf"), "live": float("inf")}
    for _ in range(_TIMED_CALLS):  # in turns; the least counts
        for name, call in (("exported", run), ("live", live)):
            start = time.perf_counter()
            call(images, mask)
            best[name] = min(best[name], 1000 * (time.perf_counter() - start))
    speed = ", ".join(f"{name} {milliseconds:.1f} ms" for name, milliseconds in best.items())
    return (
        f"{where}: largest difference to the checkpoint: logits {logits:.2g}, boxes {boxes:.2g}; "
        f"batch of {_CHECKED_IMAGES} on {jax.default_backend()}: {speed}"
    )


def _noise(model: Model, size: Size, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images whose right and lower parts are padding, each another part; or crops."""
    (height, width), random = size, np.random.default_rng(0)
    images = random.standard_normal((batch_size, height, width, 3), np.float32)
    if model.crops:
        side = model.crops.subject_size
        return images, random.standard_normal((batch_size, side, side, 3), np.float32)
    mask = np.zeros((batch_size, height, width), bool)
    for i in range(batch_size):
        mask[i, height - i * height // 8 :], mask[i, :, width - (i % 3) * width // 6 :] = True, True
    images[mask] = 0
    return images, mask


def run(arguments: argparse.Namespace) -> None:
    options = {name: getattr(arguments, name) for name in ("format", "sizes")}
    print("\n".join(export(load_model(arguments), arguments.output, **options)))
