"""From images to the people in them: boxes and emotions (paper Section 3.1, "During inference")."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from PIL import Image

from dsct_jax.batch import Predictions, padding_mask
from dsct_jax.errors import UserError
from dsct_jax.postprocess import (
    Selection,
    Subject,
    has_subject_logit,
    select_subjects,
)
from dsct_jax.preprocess import Preprocessing, Size, normalize, prepare_image

Photograph = Image.Image | np.ndarray

BATCH_SIZE = 4


@runtime_checkable
class Detector(Protocol):
    """What prediction needs to know about a model; `dsct_jax.load` returns one."""

    class_names: tuple[str, ...]
    multi_label: bool
    preprocessing: Preprocessing
    config: Any  # the run's configuration as a mapping; only loss.class_loss is read

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """Of the classes, fitted on validation."""

    @property
    def min_confidence(self) -> float | None:
        """From which a query is a person, fitted on validation."""

    def __call__(self, images: Any, padding_mask: Any) -> Predictions:
        """Normalised float32 [b h w 3] and bool [b h w] -> the predictions of all decoder layers."""
        ...


def predict(
    model: Detector,
    images: Sequence[Photograph],
    *,
    threshold: float | None = Selection.threshold,
    min_confidence: float | None = Selection.min_confidence,
    nms: float = Selection.nms,
    batch_size: int = BATCH_SIZE,
) -> list[list[Subject]]:
    """The people in every image, in the order of the images; an empty list where nobody is found.

    Args:
        model: what `dsct_jax.load` returns.
        images: PIL images of any mode, or uint8 arrays [h w 3] (RGB) or [h w] (grey).
        threshold, min_confidence, nms: see `Selection`.
        batch_size: images a call of the model. One program is compiled for each canvas of
            `model.preprocessing.buckets` that occurs.

    Raises:
        UserError: an array of another shape or type, or a number out of its range.
    """
    selection = Selection(threshold=threshold, min_confidence=min_confidence, nms=nms)
    found: list[list[Subject]] = [[] for _ in images]
    for index, _, subjects in predict_each(
        model, images, selection=selection, batch_size=min(batch_size, max(1, len(images)))
    ):
        found[index] = subjects
    return found


def predict_each(
    model: Detector,
    images: Iterable[Photograph],
    *,
    selection: Selection,
    batch_size: int = BATCH_SIZE,
) -> Iterator[tuple[int, Image.Image, list[Subject]]]:
    """(position, RGB image, people) of every image as its batch is done: any number of images, at
    most one batch a canvas in memory.

    A batch holds images of one canvas; the last ones are filled up with repetitions, so that every
    batch of a canvas has the same shape.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    waiting: dict[Size, list[_Prepared]] = defaultdict(list)
    for index, image in enumerate(images):
        image = as_rgb(image)
        pixels, size = prepare_image(image, model.preprocessing)
        canvas = pixels.shape[0], pixels.shape[1]
        waiting[canvas].append(_Prepared(index, image, pixels, size))
        if len(waiting[canvas]) == batch_size:
            yield from _predict_batch(model, waiting.pop(canvas), batch_size, selection)
    for batch in waiting.values():
        yield from _predict_batch(model, batch, batch_size, selection)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    index: int
    image: Image.Image
    pixels: np.ndarray  # uint8 [h w 3], padded to its canvas
    size: Size  # what of it is image


def _predict_batch(
    model: Detector, batch: list[_Prepared], batch_size: int, selection: Selection
) -> Iterator[tuple[int, Image.Image, list[Subject]]]:
    filled = batch + batch[-1:] * (batch_size - len(batch))
    images, mask = _to_model_input(
        np.stack([item.pixels for item in filled]),
        np.array([item.size for item in filled], np.int32),
    )
    predictions = model(images, mask)
    logits, boxes = np.asarray(predictions.logits[-1]), np.asarray(predictions.boxes[-1])
    subject_logit = has_subject_logit(
        multi_label=model.multi_label, class_loss=model.config["loss"]["class_loss"]
    )
    for i, item in enumerate(batch):
        yield (
            item.index,
            item.image,
            select_subjects(
                logits[i],
                boxes[i],
                (item.image.height, item.image.width),
                class_names=model.class_names,
                multi_label=model.multi_label,
                subject_logit=subject_logit,
                selection=selection,
                thresholds=model.thresholds,
                min_confidence=model.min_confidence,
            ),
        )


@jax.jit
def _to_model_input(pixels: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    mask = padding_mask(sizes, *pixels.shape[1:3])
    return normalize(pixels, mask), mask


def as_rgb(image: Photograph) -> Image.Image:
    """A PIL image of any mode or a uint8 array [h w 3] or [h w] as an RGB image.

    Raises:
        UserError: an array of another shape or type.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
            raise UserError(
                f"an image array must be uint8 [h w 3] (RGB) or [h w] (grey), not {image.dtype} "
                f"{list(image.shape)}; "
                "values in [0, 1] need (255 * image).round().astype('uint8')"
            )
        if 0 in image.shape:
            raise UserError(f"an image array has no pixels: {list(image.shape)}")
        image = Image.fromarray(image)
    return image.convert("RGB")
