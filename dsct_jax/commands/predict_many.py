"""An archive of images -> Parquet files, by one process or by many: chunk by chunk, each written
once and whole, whoever was killed before.

Chunk c is images c * size ... of the list, in part-NNNNNN.parquet; shard k of n takes every n-th
chunk from k on. No name knows n, so that n may change from one attempt to the next, and a chunk
whose file exists is done.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from dsct_jax.cli import progress, whole_file
from dsct_jax.commands.flags import finder_of, load_model, selection
from dsct_jax.commands.inputs import find_inputs
from dsct_jax.commands.predict import TimedDetector, weights_state
from dsct_jax.config import expanded_path
from dsct_jax.errors import UserError
from dsct_jax.inference.finders import Finder
from dsct_jax.inference.predict import predict_each, read_rgb
from dsct_jax.postprocess import Selection, Subject

RUN_FILE = "_run.json"  # readers of data sets pass over names that begin so
_AHEAD = 32  # images decoded before the model asks for them
_PERSON = pyarrow.struct(
    {
        "box": pyarrow.list_(pyarrow.float32(), 4),
        "confidence": pyarrow.float32(),
        "labels": pyarrow.list_(pyarrow.string()),
        "probabilities": pyarrow.list_(pyarrow.float32()),
    }
)
SCHEMA = pyarrow.schema(
    {
        "path": pyarrow.string(),
        "width": pyarrow.int32(),
        "height": pyarrow.int32(),
        "error": pyarrow.string(),  # why there is no answer, else null
        "people": pyarrow.list_(_PERSON),
    }
)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked of whom."""

    model: TimedDetector
    selection: Selection
    batch_size: int
    max_megapixels: float
    decoders: int  # threads
    finder: Finder | None = None  # of the people, for a two-stage network


def listed_images(paths: Sequence[str], *, exclude: Path) -> list[Path]:
    """Those of folders, patterns and files, in a fixed order; a .txt is a list, one per line."""
    lists = [expanded_path(path) for path in paths if path.endswith(".txt")]
    others = [path for path in paths if not path.endswith(".txt")]
    found = find_inputs(others, exclude=exclude)[0] if others else []
    for path in lists:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        found += [Path(line.strip()) for line in lines if line.strip()]
    return list(dict.fromkeys(found))


def parse_shard(text: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """'2/8' -> (2, 8); None: those of a Slurm array job, or (0, 1). Raises UserError."""
    if text is None:
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
        if not all(environment.get(name, "").isdecimal() for name in names):
            return 0, 1
        number, first, count = (int(environment[name]) for name in names)
        return number - first, count
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise UserError(f"--shard={text}: must be k/n with k from 0 to n - 1, such as 0/8")
    return int(k), int(n)


def claim(output: Path, about: dict[str, Any]) -> None:
    """Says in the folder what its files are of. Raises UserError where it holds another job's."""
    output.mkdir(parents=True, exist_ok=True)
    path, text = output / RUN_FILE, json.dumps(about, indent=1) + "\n"
    own = output / f".{RUN_FILE}.{os.getpid()}"
    own.write_text(text, encoding="utf-8")
    try:
        os.link(own, path)  # whole or not at all, and once
    except FileExistsError:
        if path.read_text(encoding="utf-8") != text:
            other = "holds results of other images, weights or options"
            remedy = "name another folder, or remove it"
            raise UserError(f"--output={output}: {other}; {remedy}") from None
    finally:
        own.unlink()


def _decoded(
    files: Sequence[Path], read: Callable[[Path], Image.Image], threads: int
) -> Iterator[Image.Image | UserError]:
    """Each file's image or error, in order, decoded ahead of who asks."""

    def attempt(file: Path) -> Image.Image | UserError:
        try:
            return read(file)
        except UserError as error:
            return error

    waiting: deque[Future[Image.Image | UserError]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for file in files:
            waiting.append(pool.submit(attempt, file))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _row(file: Path, size: tuple[int, int], subjects: Sequence[Subject]) -> dict[str, Any]:
    people = [
        {
            "box": subject.box,
            "confidence": subject.confidence,
            "labels": subject.labels,
            "probabilities": list(subject.probabilities.values()),
        }
        for subject in subjects
    ]
    width, height = size
    return {"path": str(file), "width": width, "height": height, "error": None, "people": people}


def predict_chunk(job: Job, files: Sequence[Path], bar: Iterator[Any]) -> list[dict[str, Any]]:
    """A row for each file, in order; the bar goes on with each."""
    rows: dict[int, dict[str, Any]] = {}
    places: list[int] = []  # of the images that can be read

    def images() -> Iterator[Image.Image]:
        read = lambda file: read_rgb(file, max_megapixels=job.max_megapixels)  # noqa: E731
        for place, found in enumerate(_decoded(files, read, job.decoders)):
            if isinstance(found, UserError):
                rows[place] = {"path": str(files[place]), "error": str(found), "people": []}
                next(bar)
            else:
                places.append(place)
                yield found

    finder = job.finder
    find = None if finder is None else lambda image, index: finder(image, str(files[places[index]]))
    how: dict[str, Any] = {"selection": job.selection, "batch_size": job.batch_size}
    for index, image, subjects in predict_each(job.model, images(), find=find, **how):
        rows[places[index]] = _row(files[places[index]], image.size, subjects)
        next(bar)
    return [rows[place] for place in range(len(files))]


def run(arguments: argparse.Namespace) -> None:
    if min(arguments.chunk, arguments.decoders) < 1:
        raise UserError("--chunk and --decoders must be at least 1")
    output, (shard, shards) = arguments.output, parse_shard(arguments.shard, os.environ)
    files = listed_images(arguments.paths, exclude=output)
    model, chosen = TimedDetector(load_model(arguments)), selection(arguments)
    finder = finder_of(arguments)
    text = "\n".join(map(str, files))
    claim(
        output,
        {
            "images": len(files),
            "list_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "chunk": arguments.chunk,
            "checkpoint": str(arguments.checkpoint),
            "weights": weights_state(arguments.checkpoint),
            "class_names": model.decoder.class_names,
            "selection": dataclasses.asdict(chosen),
            "boxes": arguments.boxes,
        },
    )
    job = Job(
        *(model, chosen, arguments.batch_size, arguments.max_megapixels, arguments.decoders), finder
    )
    starts = range(0, len(files), arguments.chunk)
    mine = [
        (output / f"part-{number:06d}.parquet", files[start : start + arguments.chunk])
        for number, start in enumerate(starts)
        if number % shards == shard
    ]
    missing = [(path, part) for path, part in mine if not path.exists()]
    done = f"{len(mine) - len(missing)} of {len(mine)} chunks were done before"
    print(f"{len(files)} images; shard {shard} of {shards}; {done}", flush=True)
    names = {b"class_names": json.dumps(model.decoder.class_names).encode()}
    began, errors, count = time.monotonic(), 0, sum(len(part) for _, part in missing)
    bar = progress(range(count), total=count)
    for path, part in missing:
        rows = predict_chunk(job, part, bar)
        table = pyarrow.Table.from_pylist(rows, schema=SCHEMA.with_metadata(names))
        with whole_file(path, "wb") as file:
            pyarrow.parquet.write_table(table, file, compression="zstd")
        errors += sum(row["error"] is not None for row in rows)
    seconds = time.monotonic() - began
    speed = f"{count} images in {seconds:.1f} s ({count / max(seconds, 1e-9):.1f} images/s)"
    print(f"{speed}, {errors} of them unreadable (column error); {output}/part-*.parquet")
    print(model.report())
