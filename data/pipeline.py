"""Files on disk -> padded numpy batches, made ahead of their use; resumable at any step."""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import connection
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from PIL import Image

from data.augment import Transform, apply, apply_crops
from data.batch_plan import FILLER, BatchPlan
from data.config import DataConfig
from data.readers.records import REMEDY, Boxes, ReadReport, Record, crowded, with_boxes
from data.readers.registry import read_split
from dsct_jax.batch import Batch, Targets
from dsct_jax.boxes import xyxy_to_cxcywh
from dsct_jax.crops import CropConfig
from dsct_jax.errors import UserError

try:
    import grain
except ImportError:  # no wheel for every platform; threads yield the same batches in the same order
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
    model: Mapping[str, Any] | None = None,
    host_index: int = 0,
    host_count: int = 1,
    crops: CropConfig | None = None,
    found: Callable[[Sequence[Record]], Sequence[Boxes]] | None = None,
) -> "Dataset":
    """Reads one split and plans its batches.

    Args:
        batch_size: images in a global batch, over all hosts.
        seed: of the order and of the augmentation; evaluation uses none.
        training: shuffled, augmented and endless; else one pass in a fixed order.
        model: the section; the report then says where there are more people than queries.
        host_index: which contiguous share of every global batch this process gets, of host_count.
        crops: what a two-stage network sees; each person is an example then.
        found: the boxes of each image, whose people are those examples, in place of the annotated.

    Raises UserError when the data cannot be used or host_count does not divide batch_size.
    """
    if batch_size < 1 or batch_size % host_count:
        remedy = "set config.train.batch_size to a multiple of it"
        raise UserError(f"batch size {batch_size} cannot be shared by {host_count} hosts: {remedy}")
    records, report = read_split(data, split)
    report.notes += filter(None, crowded(records, model or {})[1:])
    shown = records if found is None else list(map(with_boxes, records, found(records)))
    people = [(i, person) for i, record in enumerate(shown) for person in range(len(record.boxes))]
    images: list[tuple[int, int | None]] = [(i, None) for i in range(len(records))]
    examples = images if crops is None else people
    if not examples:
        raise UserError(f"{report.source}: no person to look at in {len(records)} images")
    sizes = [(records[i].height, records[i].width) for i, _ in examples]
    plan = BatchPlan(data, sizes, batch_size=batch_size, seed=seed, training=training, crops=crops)
    share = batch_size // host_count
    here = slice(host_index * share, (host_index + 1) * share)
    loader = BatchLoader(data, shown, examples, plan, here, crops)
    return Dataset(
        records,
        report,
        plan.steps_per_epoch,
        loader,
        training,
        data.num_workers,
        by_person=crops is not None,
    )


@dataclasses.dataclass
class Dataset:
    """The batches of one split."""

    records: list[Record]  # one per image, in the order of `Batch.image_ids`, as annotated
    report: ReadReport  # what the reader counted
    steps_per_epoch: int  # batches that show every image exactly once
    _loader: "BatchLoader"
    _training: bool
    _num_workers: int
    by_person: bool = False  # whether the examples are people (two-stage networks)
    # with `skip_corrupt`: name of each file that could not be read -> how often it was skipped
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)

    def class_shares(self) -> tuple[float, ...]:
        """Which share of the labels each class has."""
        counts = np.sum([record.labels.sum(0) for record in self.records], 0, np.float64)
        return tuple((counts / max(counts.sum(), 1)).tolist())

    @property
    def num_examples(self) -> int:
        """Images of the split, or people of a two-stage network."""
        return self._loader.num_examples

    def iterator(self, start_step: int = 0, steps: int | None = None) -> Iterator[Batch]:
        """Batches from number `start_step` on, `steps` of them or to the end (training has none).

        They are made in `num_workers` Grain processes when training, else in threads (starting
        processes does not pay for one pass). Leaving the loop or closing the iterator stops them.
        Raises UserError naming an image that cannot be read, unless `skip_corrupt` is set.
        """
        end = _ENDLESS if self._training else self.steps_per_epoch
        stop = end if steps is None else min(end, start_step + steps)
        workers = self._num_workers
        if grain is not None and workers > 0 and self._training:
            loaded = _load_in_processes(self._loader, start_step, stop, workers)
        else:
            loaded = _load_in_threads(self._loader, range(start_step, stop), max(1, workers))
        return self._batches(loaded)

    def _batches(self, loaded: Iterable["Loaded"]) -> Iterator[Batch]:
        for batch, skipped, error in loaded:
            if batch is None:
                raise UserError(error)
            for name, message in skipped:
                if name not in self.skipped:
                    _log.warning("skipped: %s", message)
                self.skipped[name] += 1
            yield batch


class Loaded(NamedTuple):
    """What became of a step. Errors are values: exceptions of workers arrive as pages of text."""

    batch: Batch | None  # None = `error` says why
    skipped: list[tuple[str, str]]  # name and error line of each image that could not be read
    error: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class BatchLoader:
    """Makes this host's share of the batch of a step, of examples (record, person; None = the whole
    image). Travels to worker processes, so it holds plain values only.

    A place without an image (the end of an epoch, or a damaged file) is a black image of the whole
    canvas without people, and `real` is False: an image without any pixel would make valid ratios
    of 0, and divisions by them.
    """

    _config: DataConfig
    _records: list[Record]
    _examples: Sequence[tuple[int, int | None]]
    _plan: BatchPlan
    _share: slice
    _crops: CropConfig | None = None
    # decoded, by id; only when the configuration asks for it
    _images: dict[int, Image.Image] = dataclasses.field(default_factory=dict)

    @property
    def num_examples(self) -> int:
        """How many there are."""
        return len(self._examples)

    def __call__(self, step: int) -> Loaded:
        planned = self._plan[step]
        indices, transforms = planned.indices[self._share], planned.transforms[self._share]
        batch = self._empty(len(indices), planned.bucket)
        skipped = []
        for place, (index, transform) in enumerate(zip(indices, transforms, strict=True)):
            if index == FILLER:
                continue
            number, person = self._examples[index]
            record = self._records[number]
            batch.image_ids[place] = record.image_id
            batch.original_sizes[place] = record.height, record.width
            try:
                image = self._image(record)
            except UserError as error:
                if not self._config.skip_corrupt:
                    return Loaded(None, [], f"{error}; {REMEDY}")
                skipped.append((record.name, str(error)))
                continue
            self._fill(batch, place, image, record, person, transform)
        return Loaded(batch, skipped)

    def _fill(
        self,
        batch: Batch,
        place: int,
        image: Image.Image,
        record: Record,
        person: int | None,
        transform: Transform,
    ) -> None:
        """Writes one example: the image with its people, or the crops of a person."""
        targets, kept = batch.targets, np.array([person])
        height, width = transform.size
        if self._crops is None or person is None:
            image, boxes, kept = apply(transform, image, record.boxes)
            batch.images[place, :height, :width] = np.asarray(image)
            extent = np.array([width, height, width, height], np.float32)
        else:
            crops = apply_crops(transform, image, record.boxes, person, self._crops)
            for canvases, crop in zip((batch.images, batch.subjects), crops, strict=True):
                canvases[place] = crop
            boxes = record.boxes[kept]
            extent = np.array([image.width, image.height] * 2, np.float32)
        batch.sizes[place] = height, width
        targets.boxes[place, : len(kept)] = xyxy_to_cxcywh(boxes) / extent
        targets.labels[place, : len(kept)] = record.labels[kept]
        targets.valid[place, : len(kept)] = True
        batch.real[place] = True

    def _empty(self, count: int, bucket: tuple[int, int]) -> Batch:
        crops, classes = self._crops, len(self._config.class_names)
        people = count, 1 if crops else self._config.max_targets
        subjects = (count, crops.subject_size, crops.subject_size, 3) if crops else None
        return Batch(
            images=np.zeros((count, *bucket, 3), np.uint8),
            sizes=np.full((count, 2), bucket, np.int32),
            targets=Targets(
                boxes=np.zeros((*people, 4), np.float32),
                labels=np.zeros((*people, classes), np.float32),
                valid=np.zeros(people, np.bool_),
            ),
            image_ids=np.full(count, FILLER, np.int32),
            original_sizes=np.full((count, 2), bucket, np.int32),
            real=np.zeros(count, np.bool_),
            subjects=None if subjects is None else np.zeros(subjects, np.uint8),
        )

    def _image(self, record: Record) -> Image.Image:
        image = self._images.get(record.image_id)
        if image is None:
            image = record.load()
            if image.size != (record.width, record.height):
                before = f"{record.width}x{record.height}"
                raise UserError(f"{record.name}: its size changed from {before} during the run")
            if self._config.cache:
                self._images[record.image_id] = image
        return image


def _load_in_threads(
    load: Callable[[int], Loaded], steps: Iterable[int], threads: int
) -> Iterator[Loaded]:
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
    load: Callable[[int], Loaded], start: int, stop: int, workers: int
) -> Iterator[Loaded]:
    """The same through Grain's worker processes."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain hands them to its workers, and asks for it
    steps = grain.MapDataset.range(start, stop).map(load)
    dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    with _block_signals():
        elements = iter(dataset.mp_prefetch(options, worker_init_fn=_ignore_signals))
    try:
        with _block_signals():
            element = next(elements, None)
        while element is not None:
            # copies: what arrives are views of memory that the worker owns
            yield element._replace(batch=jax.tree.map(np.array, element.batch))
            element = next(elements, None)
    finally:
        elements.close()


@contextlib.contextmanager
def _block_signals() -> Iterator[None]:
    """Workers that are started inside inherit it: SIGTERM and Ctrl-C, which reach a whole group,
    cannot end them before they ignore them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(*_: int) -> None:
    """Of a worker process: only the run answers signals; a worker whose run was killed ends."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    run = multiprocessing.parent_process()
    if run is not None:
        threading.Thread(target=_exit_with_parent, args=(run.sentinel,), daemon=True).start()


def _exit_with_parent(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
