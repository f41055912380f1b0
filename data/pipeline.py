"""Files on disk -> padded numpy batches: read, plan, decode, transform, pad, prefetch; resumable at
any step.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import connection
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from data.augment import apply
from data.batch_plan import FILLER, BatchPlan
from data.config import DataConfig
from data.readers.records import ReadReport, Record
from data.readers.registry import read_split
from dsct_jax.batch import Batch, Targets
from dsct_jax.boxes import xyxy_to_cxcywh
from dsct_jax.errors import UserError

try:
    import grain
except (
    ImportError
):  # no wheel for every platform; threads then yield the same batches in the same order
    grain = None

__all__ = ["DataConfig", "Dataset", "make_dataset"]

_ENDLESS = 2**40  # steps
_log = logging.getLogger(__name__)


def make_dataset(
    data: DataConfig,
    split: str,
    *,
    batch_size: int,
    seed: int,
    training: bool,
    host_index: int = 0,
    host_count: int = 1,
) -> "Dataset":
    """Reads one split and plans its batches.

    Args:
        data: the data configuration.
        split: train, val or test.
        batch_size: images in a global batch, over all hosts.
        seed: of the order and of the augmentation; evaluation uses none.
        training: shuffled, augmented and endless; else one pass in a fixed order.
        host_index: which contiguous share of every global batch this process gets.
        host_count: the number of such shares.

    Raises:
        UserError: annotations or images cannot be used, or batch_size is no multiple of host_count.
    """
    if batch_size < 1 or batch_size % host_count:
        raise UserError(
            f"batch size {batch_size} cannot be shared by {host_count} hosts: set "
            "config.train.batch_size to a multiple of it"
        )
    records, report = read_split(data, split)
    plan = BatchPlan(
        data,
        [(record.height, record.width) for record in records],
        batch_size=batch_size,
        seed=seed,
        training=training,
    )
    share = batch_size // host_count
    loader = BatchLoader(data, records, plan, slice(host_index * share, (host_index + 1) * share))
    return Dataset(data, records, report, plan, loader, training=training)


class Dataset:
    """The batches of one split.

    Attributes:
        records: one per image, in the order of `Batch.image_ids`.
        report: what the reader counted.
        num_images: of the split.
        steps_per_epoch: batches that show every image exactly once.
        skipped: name of each file that could not be read -> how often it was left out (only with
            `skip_corrupt`).
    """

    def __init__(
        self,
        data: DataConfig,
        records: list[Record],
        report: ReadReport,
        plan: BatchPlan,
        loader: "BatchLoader",
        *,
        training: bool,
    ) -> None:
        self.records = records
        self.report = report
        self.num_images = len(records)
        self.steps_per_epoch = plan.steps_per_epoch
        self.skipped: Counter[str] = Counter()
        self._data = data
        self._loader = loader
        self._training = training

    def iterator(self, start_step: int = 0, steps: int | None = None) -> Iterator[Batch]:
        """Batches from number `start_step` on, `steps` of them or to the end (training has none).

        Batches are made ahead of their use: in `num_workers` Grain processes when training, else in
            threads of this process (starting processes does
        not pay for a single evaluation pass). Leaving the loop or closing the iterator stops them.

        Raises:
            UserError: an image cannot be read and `skip_corrupt` is not set; the line names the
                file.
        """
        end = _ENDLESS if self._training else self.steps_per_epoch
        stop = end if steps is None else min(end, start_step + steps)
        workers = self._data.num_workers
        if grain is not None and workers > 0 and self._training:
            elements = _load_in_processes(self._loader, start_step, stop, workers)
        else:
            elements = _load_in_threads(self._loader, range(start_step, stop), max(1, workers))
        return self._batches(elements)

    def _batches(self, elements: Iterable[dict[str, Any]]) -> Iterator[Batch]:
        for element in elements:
            if element["error"]:
                raise UserError(element["error"])
            for name, message in element["skipped"]:
                if name not in self.skipped:
                    _log.warning("left out: %s", message)
                self.skipped[name] += 1
            arrays = element["arrays"]
            targets = Targets(boxes=arrays["boxes"], labels=arrays["labels"], valid=arrays["valid"])
            yield Batch(
                images=arrays["images"],
                sizes=arrays["sizes"],
                targets=targets,
                image_ids=arrays["image_ids"],
                original_sizes=arrays["original_sizes"],
                real=arrays["real"],
            )


class BatchLoader:
    """Makes this host's share of the batch of a step. Travels to worker processes, so it holds
    plain values only.

    A place without an image (the end of an epoch, or a damaged file) is a black image of the whole
    canvas without people, and `real` is False: an image without any pixel would make valid ratios
    of 0, and divisions by them.
    """

    def __init__(
        self, config: DataConfig, records: list[Record], plan: BatchPlan, share: slice
    ) -> None:
        self._config = config
        self._records = records
        self._plan = plan
        self._share = share
        self._images: dict[
            int, Image.Image
        ] = {}  # decoded, when the configuration asks for a cache

    def __call__(self, step: int) -> dict[str, Any]:
        """`arrays` of a Batch, (name, message) of `skipped` images, and the `error` line ('' =
        none).

        Errors are values here because an exception of a worker process reaches the run as a page of
        its traceback.
        """
        planned = self._plan[step]
        indices, transforms = planned.indices[self._share], planned.transforms[self._share]
        arrays = self._empty(len(indices), planned.bucket)
        skipped: list[tuple[str, str]] = []
        for place, (index, transform) in enumerate(zip(indices, transforms, strict=True)):
            if index == FILLER:
                continue
            record = self._records[index]
            arrays["image_ids"][place] = record.image_id
            arrays["original_sizes"][place] = record.height, record.width
            try:
                image = self._image(record)
            except UserError as error:
                if not self._config.skip_corrupt:
                    remedy = "repair or remove it, or set config.data.skip_corrupt=True"
                    return {"arrays": {}, "skipped": [], "error": f"{error}; {remedy}"}
                skipped.append((record.name, str(error)))
                continue
            image, boxes, kept = apply(transform, image, record.boxes)
            height, width = transform.size
            arrays["images"][place, :height, :width] = np.asarray(image)
            arrays["sizes"][place] = height, width
            arrays["boxes"][place, : len(kept)] = xyxy_to_cxcywh(boxes) / np.array(
                [width, height, width, height], np.float32
            )
            arrays["labels"][place, : len(kept)] = record.labels[kept]
            arrays["valid"][place, : len(kept)] = True
            arrays["real"][place] = True
        return {"arrays": arrays, "skipped": skipped, "error": ""}

    def _empty(self, count: int, bucket: tuple[int, int]) -> dict[str, np.ndarray]:
        people = self._config.max_targets
        return {
            "images": np.zeros((count, *bucket, 3), np.uint8),
            "sizes": np.full((count, 2), bucket, np.int32),
            "boxes": np.zeros((count, people, 4), np.float32),
            "labels": np.zeros((count, people, len(self._config.class_names)), np.float32),
            "valid": np.zeros((count, people), np.bool_),
            "image_ids": np.full(count, FILLER, np.int32),
            "original_sizes": np.full((count, 2), bucket, np.int32),
            "real": np.zeros(count, np.bool_),
        }

    def _image(self, record: Record) -> Image.Image:
        image = self._images.get(record.image_id)
        if image is None:
            image = record.load()
            if image.size != (record.width, record.height):
                raise UserError(
                    f"{record.name}: its size changed from {record.width}x{record.height} while "
                    "the run was going on"
                )
            if self._config.cache:
                self._images[record.image_id] = image
        return image


def _load_in_threads(
    load: Callable[[int], dict[str, Any]], steps: Iterable[int], threads: int
) -> Iterator[dict[str, Any]]:
    """load(step) for every step in order, at most `threads` + 1 of them ahead of the consumer."""
    pending: deque[Future] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="data") as pool:
        try:
            for step in steps:
                pending.append(pool.submit(load, step))
                if len(pending) > threads + 1:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _load_in_processes(
    load: Callable[[int], dict[str, Any]], start: int, stop: int, workers: int
) -> Iterator[dict[str, Any]]:
    """The same through Grain's worker processes."""
    if not flags.FLAGS.is_parsed():
        # Grain hands the flags to its workers and stops where nobody has parsed any
        flags.FLAGS.mark_as_parsed()
    dataset = (
        grain.MapDataset.range(start, stop)
        .map(load)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    )
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    with _block_signals():
        elements = iter(dataset.mp_prefetch(options, worker_init_fn=_ignore_signals))
    try:
        with _block_signals():
            element = next(elements, None)
        while element is not None:
            # Copies: what arrives are views of shared memory that the sender owns only until its
            # process is stopped.
            yield element | {
                "arrays": {name: np.array(array) for name, array in element["arrays"].items()}
            }
            element = next(elements, None)
    finally:
        elements.close()


@contextlib.contextmanager
def _block_signals() -> Iterator[None]:
    """Workers that are started inside inherit it: SIGTERM and Ctrl-C, which reach a whole group, do
    not end them before they can ignore them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(worker: int, workers: int) -> None:
    """Called in each worker process: what a signal means is the run's business, which stops its
    workers; and a worker whose run was killed ends.
    """
    del worker, workers
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    run = multiprocessing.parent_process()
    if run is not None:
        threading.Thread(
            target=_exit_with_parent, args=(run.sentinel,), name="end with the run", daemon=True
        ).start()


def _exit_with_parent(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
