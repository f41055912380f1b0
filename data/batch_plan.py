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

Evaluation. One pass in which an image's canvas depends on that image alone; each canvas completes
its own last batch with fillers.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from data.augment import NUM_DRAWS, Transform, draw
from data.config import DataConfig
from dsct_jax.preprocess import Size, choose_bucket, fit_bucket, resized_size, shrink_to_fit

FILLER = -1  # index of a place in a batch that no image takes


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """One global batch: `indices` [batch_size] of records (FILLER = none) and the transform of
    each.
    """

    bucket: Size  # padded (height, width)
    indices: tuple[int, ...]
    transforms: tuple[Transform, ...]


class BatchPlan:
    """Random access to the batches of one split by step.

    Args:
        config: sizes, probabilities and canvases.
        sizes: (height, width) of every image of the split.
        batch_size: images in a global batch.
        seed: of the whole stream.
        training: an endless stream of epochs, or one pass in evaluation.
    """

    def __init__(
        self,
        config: DataConfig,
        sizes: Sequence[Size],
        *,
        batch_size: int,
        seed: int,
        training: bool,
    ) -> None:
        self._config = config
        self._sizes = tuple(sizes)
        self._batch_size = batch_size
        self._seed = seed
        self._training = training
        # the last two used; two threads may compute the same one, with the same result
        self._epochs: dict[int, list[PlannedBatch]] = {}
        steps = -(-len(self._sizes) // batch_size) if training else len(self._epoch(0))
        self.steps_per_epoch = steps

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
        uniforms = rng.random((len(self._sizes), NUM_DRAWS))
        batches: list[PlannedBatch] = []
        queues: dict[Size, list[tuple[int, Transform]]] = {
            bucket: [] for bucket in self._config.buckets
        }
        for index in order:
            height, width = self._sizes[index]
            transform = draw(self._config, height, width, uniforms[index].tolist())
            size, bucket = fit_bucket(transform.size, self._config.buckets)
            queue = queues[bucket]
            queue.append((index, dataclasses.replace(transform, size=size)))
            if len(queue) == self._batch_size:
                batches.append(self._batch(bucket, queue))
                queue.clear()
        left = [entry for bucket in self._config.buckets for entry in queues[bucket]]
        for start in range(0, len(left), self._batch_size):
            batches.append(self._mixed_batch(left[start : start + self._batch_size]))
        return batches

    def _evaluation_pass(self) -> list[PlannedBatch]:
        queues: dict[Size, list[tuple[int, Transform]]] = defaultdict(list)
        for index, (height, width) in enumerate(self._sizes):
            wanted = resized_size(
                height, width, self._config.eval_short_side, self._config.max_long_side
            )
            size, bucket = fit_bucket(wanted, self._config.buckets)
            queues[bucket].append((index, Transform(size)))
        return [
            self._batch(bucket, queue[start : start + self._batch_size])
            for bucket, queue in queues.items()
            for start in range(0, len(queue), self._batch_size)
        ]

    def _mixed_batch(self, entries: Sequence[tuple[int, Transform]]) -> PlannedBatch:
        """The remainders of several queues on one canvas: one that holds them all, else the one
        that scales them down least in total.
        """
        bucket = choose_bucket([transform.size for _, transform in entries], self._config.buckets)
        if bucket is None:
            bucket = max(
                self._config.buckets,
                key=lambda canvas: sum(
                    shrink_to_fit(t.size, canvas)[0] / t.size[0] for _, t in entries
                ),
            )
        fitted = [
            (index, dataclasses.replace(transform, size=shrink_to_fit(transform.size, bucket)))
            for index, transform in entries
        ]
        return self._batch(bucket, fitted)

    def _batch(self, bucket: Size, entries: Sequence[tuple[int, Transform]]) -> PlannedBatch:
        missing = self._batch_size - len(entries)
        indices, transforms = zip(*entries, strict=True)
        return PlannedBatch(
            bucket, indices + (FILLER,) * missing, transforms + (Transform(bucket),) * missing
        )
