"""How fast images come: decoding, augmentation and the whole pipeline, beside torch's DataLoader
with the same transforms in the same run.

    python -m benchmarks.input_pipeline --torch --output=benchmarks/input_pipeline

DETR's recipe (the defaults of configs/base.py) on JPEG images made for the purpose, 640x480 and
1066x800, batches of 4. The contestants take turns, round after round, because a machine is never
quiet; the table gives the median over the rounds and the range. torch's side is what DETR's
repository does with PIL and tensors: float32, normalised and padded to the largest of the batch on
the CPU, where ours hands over uint8.
"""

import contextlib
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.tables import add_output, report, table
from data.augment import NUM_DRAWS, apply, draw
from data.command import data_config
from data.config import DataConfig
from data.pipeline import make_dataset
from data.readers.records import Record
from data.readers.registry import read_split
from data.tools.prepare import prepare
from dsct_jax.cli import Parser, run_command
from dsct_jax.errors import UserError
from dsct_jax.parallel import Prefetch

SOURCES = ((480, 640), (800, 1066))  # (height, width)
BATCH_SIZE = 4
CONFIG = Path(__file__).parent.parent / "configs" / "caer_s_r50.py"
Row = dict[str, Any]


def write_images(folder: Path, size: tuple[int, int], count: int) -> DataConfig:
    """`count` JPEG files with the detail of photographs (about 1.5 bits per pixel) and two people
    each, as COCO-style data.
    """
    folder.mkdir(parents=True)
    height, width = size
    images, people = [], []
    for number in range(count):
        rng = np.random.default_rng(number)
        layers = [
            rng.normal(
                0, 60 / 2**level, (height // 2 ** (6 - level) + 2, width // 2 ** (6 - level) + 2, 3)
            )
            for level in range(6)
        ]
        smooth = [
            Image.fromarray((layer + 128).clip(0, 255).astype(np.uint8)).resize((width, height))
            for layer in layers
        ]
        pixels = np.sum([np.asarray(image, np.float32) - 128 for image in smooth], axis=0) + 128
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
            folder / f"{number}.jpg", quality=85
        )
        images.append({"id": number, "file_name": f"{number}.jpg"})
        people += [
            {
                "id": 2 * number + i,
                "image_id": number,
                "category_id": i,
                "bbox": [40 + 200 * i, 60, 120, 150],
            }
            for i in range(2)
        ]
    for split in ("train", "val", "test"):
        (folder / f"{split}.json").write_text(json.dumps({"images": images, "annotations": people}))
    return data_config(CONFIG, [f"--config.data.data_dir={folder}", "--config.data.source=coco"])


def decode_rate(records: Sequence[Record], seconds: float) -> float:
    """Images a second of one thread: file to RGB."""
    return _rate(lambda number: records[number % len(records)].load(), seconds)


def augment_rate(config: DataConfig, records: Sequence[Record], seconds: float) -> float:
    """Images a second of one thread: a decoded image to the augmented one, DETR's recipe."""
    image, record, rng = records[0].load(), records[0], np.random.default_rng(0)
    draws = rng.random((997, NUM_DRAWS)).tolist()
    return _rate(
        lambda number: apply(
            draw(config, image.height, image.width, draws[number % 997]), image, record.boxes
        ),
        seconds,
    )


def _rate(work: Callable[[int], object], seconds: float) -> float:
    work(0)
    start, number = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        work(number)
        number += 1
    return number / passed


def pipeline_batches(config: DataConfig, workers: int, *, seed: int = 0) -> Iterator[object]:
    """The training batches, made by `workers` processes (0: a thread of this one)."""
    config = dataclasses.replace(config, num_workers=workers)
    return make_dataset(config, "train", batch_size=BATCH_SIZE, seed=seed, training=True).iterator()


def torch_batches(config: DataConfig, workers: int) -> Iterator[object]:
    """The same by torch's DataLoader, endless. Transforms as DETR's datasets/transforms.py has
    them.
    """
    import torch
    from torch.utils.data import DataLoader, Dataset

    records, _ = read_split(config, "train")

    class Photographs(Dataset):
        def __len__(self) -> int:
            return 2**20

        def __getitem__(self, number: int) -> Any:
            torch.set_num_threads(1)
            record = records[number % len(records)]
            image = record.load()
            uniform = np.random.default_rng(number).random(NUM_DRAWS).tolist()
            image, boxes, kept = apply(
                draw(config, image.height, image.width, uniform), image, record.boxes
            )
            pixels = (
                torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
            )
            mean, std = (
                torch.tensor(three)[:, None, None]
                for three in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            )
            return (
                (pixels - mean) / std,
                torch.from_numpy(boxes),
                torch.from_numpy(record.labels[kept]),
            )

    def padded(samples: list) -> Any:
        height, width = (max(image.shape[axis] for image, _, _ in samples) for axis in (1, 2))
        images, masks = (
            torch.zeros(len(samples), 3, height, width),
            torch.ones(len(samples), height, width, dtype=torch.bool),
        )
        for place, (image, _, _) in enumerate(samples):
            images[place, :, : image.shape[1], : image.shape[2]].copy_(image)
            masks[place, : image.shape[1], : image.shape[2]] = False
        return images, masks, [(boxes, labels) for _, boxes, labels in samples]

    return iter(
        DataLoader(
            Photographs(),
            batch_size=BATCH_SIZE,
            num_workers=workers,
            collate_fn=padded,
            multiprocessing_context="fork" if workers else None,
        )
    )


def batch_rate(batches: Iterator[object], seconds: float, *, warm_up: int = 6) -> float:
    """Images a second that leave an iterator, its start and what it had made ahead not counted."""
    with contextlib.ExitStack() as stack:
        if hasattr(batches, "close"):
            stack.callback(batches.close)
        for _ in range(warm_up):
            next(batches)
        start, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds:
            next(batches)
            count += 1
    return count * BATCH_SIZE / passed


def _measured(
    make: Callable[[DataConfig, int], Iterator[object]],
    config: DataConfig,
    workers: int,
    seconds: float,
) -> float:
    return batch_rate(make(config, workers), seconds)


def data_wait(config: DataConfig, workers: int, step_seconds: float, *, steps: int = 30) -> float:
    """Share of the time that a device which needs `step_seconds` a batch stands still for want of
    data.
    """
    with Prefetch(
        pipeline_batches(config, workers), lambda batch: batch
    ) as batches:  # as train.py takes them
        stream = iter(batches)
        for _ in range(6):
            next(stream)
            time.sleep(step_seconds)
        batches.pop_wait()
        start = time.perf_counter()
        for _ in range(steps):
            next(stream)
            time.sleep(step_seconds)  # what a device does meanwhile takes none of the CPU's time
        return batches.pop_wait() / (time.perf_counter() - start)


def measure(
    folder: Path,
    *,
    count: int,
    rounds: int,
    seconds: float,
    workers: Sequence[int],
    with_torch: bool,
) -> list[Row]:
    """Every row of the table."""
    rows: list[Row] = []
    for size in SOURCES:
        name = f"{size[1]}x{size[0]}"
        raw = write_images(folder / name, size, count)
        output = folder / f"{name}_prepared"
        prepare(raw, output, splits=["train"])
        ready = dataclasses.replace(raw, source="prepared", data_dir=str(output))
        records, prepared_records = (read_split(config, "train")[0] for config in (raw, ready))
        contestants: dict[tuple[str, int], Callable[[], float]] = {
            ("decode", 0): partial(decode_rate, records, seconds),
            ("decode, prepared", 0): partial(decode_rate, prepared_records, seconds),
            ("augment", 0): partial(augment_rate, raw, records, seconds),
        }
        for number in workers:
            contestants["pipeline", number] = partial(
                _measured, pipeline_batches, raw, number, seconds
            )
            contestants["pipeline, prepared", number] = partial(
                _measured, pipeline_batches, ready, number, seconds
            )
            if with_torch:
                contestants["torch DataLoader", number] = partial(
                    _measured, torch_batches, raw, number, seconds
                )
        found: dict[tuple[str, int], list[float]] = {key: [] for key in contestants}
        for round_number in range(rounds):
            for key, contestant in contestants.items():
                found[key].append(contestant())
                print(
                    f"{name}, round {round_number + 1}/{rounds}: {key[0]}, {key[1]} workers: "
                    f"{found[key][-1]:.1f} images/s",
                    file=sys.stderr,
                )
        rows += [
            {"source": name, "what": what, "workers": number, "images_per_s": rates}
            for (what, number), rates in found.items()
        ]
        if 2 in workers:
            step = 1.5 * BATCH_SIZE / statistics.median(found["pipeline", 2])
            shares = [data_wait(raw, 2, step) for _ in range(rounds)]
            rows.append(
                {
                    "source": name,
                    "what": f"data wait, a device step of {1000 * step:.0f} ms",
                    "workers": 2,
                    "share": shares,
                }
            )
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """The table in markdown."""
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"Pillow {Image.__version__}"
    )
    title = (
        f"DETR's training recipe, batches of {BATCH_SIZE} ({machine}). Workers are processes; 0 = "
        "one thread of this one."
    )
    columns = ("source", "what", "workers", "images/s, median (range)", "beside torch")
    cells = []
    torch_rate = {
        (row["source"], row["workers"]): statistics.median(row["images_per_s"])
        for row in rows
        if row["what"] == "torch DataLoader"
    }
    for row in rows:
        numbers = row.get("images_per_s") or [100 * share for share in row["share"]]
        unit = "" if "images_per_s" in row else " %"
        text = f"{statistics.median(numbers):.1f}{unit} ({min(numbers):.1f} to {max(numbers):.1f})"
        other = (
            torch_rate.get((row["source"], row["workers"]))
            if row["what"].startswith(("pipeline", "torch"))
            else None
        )
        ratio = f"{statistics.median(numbers) / other:.2f}x" if other else ""
        cells.append((row["source"], row["what"], row["workers"], text, ratio))
    return f"{title}\n\n{table(columns, cells)}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = Parser(prog="python -m benchmarks.input_pipeline", description=__doc__)
    parser.add_argument(
        "--torch",
        action="store_true",
        help="measure torch's DataLoader as well (needs the torch extra)",
    )
    parser.add_argument("--images", type=int, default=64, help="images of each size (default 64)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of each measurement (default 4)"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    add_output(parser)

    def run() -> None:
        arguments = parser.parse_args(argv)
        if arguments.images < BATCH_SIZE or arguments.rounds < 1 or min(arguments.workers) < 0:
            raise UserError(
                f"needs --images of at least {BATCH_SIZE}, --rounds of at least 1, and --workers "
                "of 0 or more"
            )
        with tempfile.TemporaryDirectory() as folder:
            options = {name: getattr(arguments, name) for name in ("rounds", "seconds", "workers")}
            rows = measure(
                Path(folder), count=arguments.images, with_torch=arguments.torch, **options
            )
        report(format_rows(rows), rows, arguments.output)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
