"""What a model says of a whole split, from batches spread over devices and processes."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dsct_jax.batch import Batch, Predictions
from dsct_jax.boxes import to_pixels
from dsct_jax.errors import UserError
from dsct_jax.evaluation.results import ImageResult, ResultsInfo, Shown, SplitResults, stack_results
from dsct_jax.parallel import Prefetch, shard_batch


def collect_results(
    predict: Callable[[Batch], Predictions],
    batches: Iterable[Batch],
    about: ResultsInfo,
    *,
    num_images: int,
    source: str,
    mesh: Mesh,
    keep: int = 0,
) -> tuple[SplitResults, list[Shown]]:
    """What `predict` says of every image, on every process; and the first `keep` images of this
    process with it.

    Args:
        predict: an eval step, on a batch of the mesh.
        batches: this process's share.
        num_images: of all processes; each has to come exactly once.
        source: what the UserError calls the data of which no image could be read.
    """
    results: list[ImageResult] = []
    shown: list[Shown] = []
    seen = 0
    with Prefetch(batches, lambda batch: (batch, shard_batch(batch, mesh))) as pairs:
        for batch, sharded in pairs:
            predictions = on_host(predict(sharded))
            whole = on_host(dataclasses.replace(sharded, images=None))
            logits, boxes = predictions.logits[-1], predictions.boxes[-1]
            results += image_results(whole, logits, boxes)
            seen += int((whole.image_ids >= 0).sum())  # damaged images keep their number
            if keep > 0:
                first, number = jax.process_index() * len(batch.real), min(keep, len(batch.real))
                here = slice(first, first + number)
                kept = jax.tree.map(operator.itemgetter(slice(number)), batch)
                shown.append((kept, logits[here], boxes[here]))
                keep -= number
    if seen != num_images:
        raise RuntimeError(f"evaluated {seen} of {num_images} images")
    if not results:
        raise UserError(f"{source}: none of its {num_images} images could be read")
    return stack_results(results, about), shown


def on_host(tree: Any) -> Any:
    """Global arrays -> whole numpy arrays, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def image_results(batch: Batch, logits: np.ndarray, boxes: np.ndarray) -> Iterator[ImageResult]:
    """The real images of a batch with their predictions and people."""
    for i in np.flatnonzero(batch.real):
        valid = batch.targets.valid[i]
        height, width = map(int, batch.original_sizes[i])
        yield ImageResult(
            image_id=int(batch.image_ids[i]),
            logits=logits[i],
            boxes=boxes[i],
            size=(height, width),
            gt_boxes=to_pixels(batch.targets.boxes[i][valid], (height, width)),
            gt_labels=batch.targets.labels[i][valid],
        )
