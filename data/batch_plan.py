"""The batch plan: which images form batch number `step`, on which canvas, and how each is
transformed.

The plan is the data source of the pipeline. A batch is a pure function of (configuration, image
sizes, seed, step), so the position in the stream is one integer: resuming is asking for the next
step, and any number of workers yields the same batches in the same order.

Training. Every epoch is a permutation drawn from (seed, epoch); the random numbers of an image's
transform are its row of a table drawn from (seed, epoch). Images are queued by the smallest canvas
that holds their transformed size, and a full queue becomes a batch. What the queues still hold at
the end of the epoch is put together on the canvas that asks for the least scaling down. Each epoch
therefore has ceil(images / batch_size) steps and shows every image exactly once; the last batch may
be completed with fillers (`real` False).

The examples of a two-stage network are people instead of images, all on one canvas; in training
the last batch is completed with the epoch's first people, so that batch norms see people only.

Evaluation. One pass in which an image's canvas depends on that image alone; each canvas completes
its own last batch with fillers.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from data.augment import (
    NUM_DRAWS,
    NUM_ERASING_DRAWS,
    Transform,
    draw,
    draw_crops,
    draw_erased,
)
from data.config import DataConfig
from dsct_jax.crops import CropConfig
from dsct_jax.preprocess import Size, choose_bucket, fit_bucket, resized_size, shrink_to_fit

FILLER = -1  # index of a place in a batch that no image takes
Entry = tuple[int, Transform]  # index of an image and what is done to it


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """One global batch."""

    bucket: Size  # padded (height, width)
    indices: tuple[int, ...]  # [batch_size] of records, FILLER = none
    transforms: tuple[Transform, ...]


class BatchPlan:
    """Random access by step to the batches of a split whose images have these (height, width).

    `training`: an endless stream of epochs, else one pass. `batch_size` counts all hosts. `crops`:
    the examples are people, and these are the sizes of their images.
    """

    def __init__(
        self,
        config: DataConfig,
        sizes: Sequence[Size],
        *,
        batch_size: int,
        seed: int,
        training: bool,
        crops: CropConfig | None = None,
    ) -> None:
        self._config, self._sizes, self._batch_size = config, tuple(sizes), batch_size
        self._crops, self._buckets = crops, crops.canvases if crops else config.buckets
        self._seed, self._training = seed, training
        # the last two used; two threads may compute the same one, with the same result
        self._epochs: dict[int, list[PlannedBatch]] = {}
        self.steps_per_epoch = -(-len(sizes) // batch_size) if training else len(self._epoch(0))

    def __getitem__(self, step: int) -> PlannedBatch:
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[position]

    def _epoch(self, epoch: int) -> list[PlannedBatch]:
        batches = self._epochs.get(epoch)
        if batches is None:
            batches = self._training_epoch(epoch) if self._training else self._evaluation_pass()
            for old in [known for known in list(self._epochs) if known < epoch - 1]:
                self._epochs.pop(old, None)
            self._epochs[epoch] = batches
        return batches

    def _training_epoch(self, epoch: int) -> list[PlannedBatch]:
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self._sizes)).tolist()
        if self._crops:
            order += np.resize(order, -len(order) % self._batch_size).tolist()
        uniforms = rng.random((len(self._sizes), NUM_DRAWS))
        # of their own, so that the other numbers are the same without them
        erasing = np.random.default_rng((self._seed, epoch, NUM_ERASING_DRAWS))
        more = erasing.random((len(self._sizes), NUM_ERASING_DRAWS))
        batches: list[PlannedBatch] = []
        queues: dict[Size, list[Entry]] = {bucket: [] for bucket in self._buckets}
        for index in order:
            height, width = self._sizes[index]
            numbers = uniforms[index].tolist()
            erased = None
            if self._crops:
                transform = draw_crops(self._config, self._crops, numbers)
            else:
                transform = draw(self._config, height, width, numbers)
                erased = draw_erased(self._config, more[index].tolist())
            size, bucket = fit_bucket(transform.size, self._buckets)
            queue = queues[bucket]
            queue.append((index, dataclasses.replace(transform, size=size, erased=erased)))
            if len(queue) == self._batch_size:
                batches.append(self._batch(bucket, queue))
                queue.clear()
        left = [entry for bucket in self._buckets for entry in queues[bucket]]
        for start in range(0, len(left), self._batch_size):
            batches.append(self._mixed_batch(left[start : start + self._batch_size]))
        return batches

    def _evaluation_pass(self) -> list[PlannedBatch]:
        queues: dict[Size, list[Entry]] = defaultdict(list)
        limits = self._config.eval_short_side, self._config.max_long_side
        for index, (height, width) in enumerate(self._sizes):
            if self._crops:
                (wanted,) = self._buckets
            else:
                wanted = resized_size(height, width, *limits)
            size, bucket = fit_bucket(wanted, self._buckets)
            queues[bucket].append((index, Transform(size)))
        return [
            self._batch(bucket, queue[start : start + self._batch_size])
            for bucket, queue in queues.items()
            for start in range(0, len(queue), self._batch_size)
        ]

    def _mixed_batch(self, entries: Sequence[Entry]) -> PlannedBatch:
        """What several queues have left, on the canvas that holds all or scales down least."""
        sizes = [transform.size for _, transform in entries]

        def scale(bucket: Size) -> float:
            return sum(shrink_to_fit(size, bucket)[0] / size[0] for size in sizes)

        buckets = self._buckets
        bucket = choose_bucket(sizes, buckets) or max(buckets, key=scale)
        fitted = [
            (index, dataclasses.replace(transform, size=shrink_to_fit(transform.size, bucket)))
            for index, transform in entries
        ]
        return self._batch(bucket, fitted)

    def _batch(self, bucket: Size, entries: Sequence[Entry]) -> PlannedBatch:
        missing = self._batch_size - len(entries)
        filled = [*entries, *[(FILLER, Transform(bucket))] * missing]
        indices, transforms = zip(*filled, strict=True)
        return PlannedBatch(bucket, indices, transforms)
