"""From images to the people in them: boxes and emotions (paper Section 3.1, "During inference")."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from PIL import Image

from dsct_jax.batch import Predictions, padding_mask
from dsct_jax.config import BATCH_SIZE, MAX_MEGAPIXELS
from dsct_jax.errors import UserError
from dsct_jax.inference.people import Find, predict_people
from dsct_jax.postprocess import Decoder, Selection, Subject
from dsct_jax.preprocess import (
    DECODE_ERRORS,
    Preprocessing,
    Size,
    decode_image,
    normalize,
    prepare_image,
    to_rgb,
)

# A file, a PIL image of any mode, or a uint8 array [h w 3] (RGB) or [h w] (grey).
AnyImage = str | Path | Image.Image | np.ndarray


@runtime_checkable
class Detector(Protocol):
    """What prediction needs to know about a model; `dsct_jax.load` returns one."""

    preprocessing: Preprocessing
    decoder: Decoder

    def __call__(self, images: Any, padding_mask: Any) -> Predictions:
        """Normalized float32 [b h w 3] and bool [b h w] -> the predictions of all layers."""
        ...


def predict(
    model: Detector,
    images: AnyImage | Iterable[AnyImage],
    *,
    threshold: float | None = Selection.threshold,
    min_confidence: float | None = Selection.min_confidence,
    nms: float = Selection.nms,
    batch_size: int = BATCH_SIZE,
    boxes: Any = None,
) -> list[Any]:
    """The people in one image: `Subject`s, most confident first; empty where nobody is found. Of
    several images a list of such lists, in their order.

    Args:
        model: what `dsct_jax.load` returns.
        images: one image, or an iterable of them: a path, a PIL image, or a uint8 array [h w 3]
            (RGB) or [h w] (grey). The EXIF orientation of paths and PIL images is applied; boxes
            are in pixels of the upright image.
        threshold, min_confidence, nms: see `Selection`.
        batch_size: images per call of the model, which compiles once per canvas; people, of a
            two-stage network.
        boxes: of the people that a two-stage network asks for: (x1, y1, x2, y2) in pixels [n 4], of
            several images one such array each.

    Raises:
        UserError: something that is no image, or a number out of its range.
    """
    selection = Selection(threshold=threshold, min_confidence=min_confidence, nms=nms)
    single = isinstance(images, AnyImage) or not isinstance(images, Iterable)
    several: Any = [images] if single else images
    if isinstance(several, Sized):
        batch_size = min(batch_size, max(1, len(several)))
    find = None if boxes is None else lambda _, index: boxes if single else boxes[index]
    answers = predict_each(model, several, selection=selection, batch_size=batch_size, find=find)
    found = {index: subjects for index, _, subjects in answers}
    return found[0] if single else [found[index] for index in sorted(found)]


def predict_each(
    model: Detector,
    images: Iterable[AnyImage],
    *,
    selection: Selection,
    batch_size: int = BATCH_SIZE,
    find: Find | None = None,
) -> Iterator[tuple[int, Image.Image, list[Subject]]]:
    """(position, RGB image, people) of every image as its batch is done: at most one batch per
    canvas is in memory. The last ones are filled up with repetitions, to have the same shape.
    `find` names the people of an image to a two-stage network, and to no other.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    two_stage = getattr(model, "crops", None) is not None
    if two_stage and find is None:
        raise UserError("a two-stage network finds nobody by itself: name the people with boxes")
    if find is not None:
        if not two_stage:
            raise UserError("this network finds its people itself: leave the boxes away")
        people = map(read_rgb, images)
        yield from predict_people(model, people, find, selection=selection, batch_size=batch_size)
        return
    waiting: dict[Size, list[_Prepared]] = defaultdict(list)
    for index, image in enumerate(images):
        rgb = read_rgb(image)
        pixels, size = prepare_image(rgb, model.preprocessing)
        canvas = pixels.shape[0], pixels.shape[1]
        waiting[canvas].append(_Prepared(index, rgb, pixels, size))
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
    sizes = np.array([item.size for item in filled], np.int32)
    predictions = model(*to_model_input(np.stack([item.pixels for item in filled]), sizes))
    # sliced here: on the device each slice is a program to compile
    logits, boxes = np.asarray(predictions.logits)[-1], np.asarray(predictions.boxes)[-1]
    for i, item in enumerate(batch):
        size = item.image.height, item.image.width
        subjects = model.decoder(logits[i], boxes[i], size, selection=selection)
        yield item.index, item.image, subjects


@jax.jit
def to_model_input(pixels: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Padded uint8 images [b h w 3] and the (height, width) each fills -> what a model takes."""
    mask = padding_mask(sizes, *pixels.shape[1:3])
    return normalize(pixels, mask), mask


def read_rgb(image: Any, *, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """One image of any kind that `predict` takes as upright RGB. Raises UserError, also for a file
    of more than `max_megapixels`.
    """
    if isinstance(image, str | Path):
        return decode_image(Path(image), upright=True, max_megapixels=max_megapixels)
    if isinstance(image, Image.Image):
        name = str(getattr(image, "filename", "") or "a PIL image")
        try:
            return to_rgb(image, name, upright=True)
        except UserError:
            raise
        except DECODE_ERRORS as error:
            raise UserError(f"{name}: cannot be read as an image ({error})") from None
    if not isinstance(image, np.ndarray):
        kinds = "a path, a PIL image or a uint8 array"
        raise UserError(f"an image must be {kinds}, not {type(image).__name__}")
    grey = image.ndim == 2 and image.shape[1] != 3  # [n 3] is a row of colors
    if image.dtype != np.uint8 or not (grey or (image.ndim == 3 and image.shape[2] == 3)):
        raise UserError(
            f"an image array must be uint8 [h w 3] (RGB) or [h w] (grey), not {image.dtype} "
            f"{list(image.shape)}; values in [0, 1] need (255 * image).round().astype('uint8'), "
            "several images a list"
        )
    if 0 in image.shape:
        raise UserError(f"an image array has no pixels: {list(image.shape)}")
    return Image.fromarray(image).convert("RGB")
