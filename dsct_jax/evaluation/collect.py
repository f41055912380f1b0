"""What a model says of a whole split, from batches spread over devices and processes."""

import dataclasses
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dsct_jax.batch import Batch, Predictions
from dsct_jax.boxes import to_pixels
from dsct_jax.errors import UserError
from dsct_jax.evaluation.results import ImageResult, ResultsInfo, Shown, SplitResults, stack_results
from dsct_jax.parallel import Prefetch, shard_batch

_NOBODY = -10.0  # logits of a query that stands for nobody


@runtime_checkable
class Annotated(Protocol):
    """An image and its people: boxes (x1, y1, x2, y2) in pixels, labels [t k]."""

    image_id: int
    width: int
    height: int
    boxes: Any
    labels: Any


@runtime_checkable
class Split(Protocol):
    """A split whose batches are this process's share."""

    report: Any  # its `source` is what a UserError calls the data
    by_person: bool  # an example is a person, of whom `records` has the image

    @property
    def records(self) -> Sequence[Any]:
        """Every image, `Annotated`."""

    @property
    def num_examples(self) -> int:
        """Of all processes; each has to come exactly once."""

    def iterator(self) -> Iterable[Batch]:
        """One pass."""


def collect_results(
    predict: Callable[[Batch], Predictions],
    data: Split,
    about: ResultsInfo,
    *,
    mesh: Mesh,
    keep: int = 0,
) -> tuple[SplitResults, list[Shown]]:
    """What `predict`, an eval step on a batch of the mesh, says of every image, on every process;
    and the first `keep` images of this process with it (none of people cut out).
    """
    keep = 0 if data.by_person else keep
    results: list[ImageResult] = []
    shown: list[Shown] = []
    seen = 0
    with Prefetch(data.iterator(), lambda batch: (batch, shard_batch(batch, mesh))) as pairs:
        for batch, sharded in pairs:
            predictions = on_host(predict(sharded))
            whole = on_host(dataclasses.replace(sharded, images=None, subjects=None))
            logits, boxes = predictions.logits[-1], predictions.boxes[-1]
            results += image_results(whole, logits, boxes)
            seen += int((whole.image_ids >= 0).sum())  # damaged images keep their number
            if keep > 0:
                first, number = jax.process_index() * len(batch.real), min(keep, len(batch.real))
                here = slice(first, first + number)
                kept = jax.tree.map(operator.itemgetter(slice(number)), batch)
                shown.append((kept, logits[here], boxes[here]))
                keep -= number
    if seen != data.num_examples:
        raise RuntimeError(f"evaluated {seen} of {data.num_examples} examples")
    if not results:
        images = f"none of its {len(data.records)} images could be read"
        raise UserError(f"{data.report.source}: {images}")
    if data.by_person:
        results = merge_people(results, data.records)
    return stack_results(results, about), shown


def merge_people(answers: Sequence[ImageResult], images: Iterable[Annotated]) -> list[ImageResult]:
    """The answers for single people as the queries of their images, whose people are those of
    `images`. An image with fewer answers than others gets queries that are surely nobody.
    """
    by_image: dict[int, list[ImageResult]] = defaultdict(list)
    for answer in answers:
        by_image[answer.image_id].append(answer)
    most, channels = max(map(len, by_image.values())), answers[0].logits.shape[-1]
    nobody, nowhere = (
        np.full((most, channels), _NOBODY, np.float32),
        np.zeros((most, 4), np.float32),
    )
    merged = []
    for image in images:
        found = by_image[image.image_id]
        logits, boxes = (
            np.concatenate([*(getattr(answer, name) for answer in found), empty])[:most]
            for name, empty in (("logits", nobody), ("boxes", nowhere))
        )
        size = (image.height, image.width)
        people = np.asarray(image.boxes), np.asarray(image.labels)
        merged.append(ImageResult(image.image_id, logits, boxes, size, *people))
    return merged


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
