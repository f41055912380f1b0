"""Two-stage networks: people whom somebody else has found -> what they feel."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from PIL import Image

from dsct_jax.boxes import xyxy_to_cxcywh
from dsct_jax.crops import cut_crops, normalize_crops, round_crop
from dsct_jax.postprocess import Selection, Subject

# (image, its position) -> [n 4], (x1, y1, x2, y2) in pixels
Find = Callable[[Image.Image, int], Any]


@dataclasses.dataclass(frozen=True)
class GivenSubject(Subject):
    """One person whose box was given, and what the network weighed."""

    fusion_weights: tuple[float, ...] | None = None  # of face and context; they sum to 1
    # [h w] over the cells of the context; they sum to 1
    attention: tuple[tuple[float, ...], ...] | None = None


@dataclasses.dataclass(frozen=True)
class _Waiting:
    index: int
    image: Image.Image
    boxes: np.ndarray  # float32 [n 4], each with an area inside the image


def predict_people(
    model: Any, images: Iterable[Image.Image], find: Find, *, selection: Selection, batch_size: int
) -> Iterator[tuple[int, Image.Image, list[Subject]]]:
    """(position, image, people) of every RGB image, `batch_size` people at a time. The selection's
    threshold counts; whoever is given is a person.
    """
    selection = dataclasses.replace(selection, min_confidence=0.0, nms=1.0)
    waiting: list[_Waiting] = []
    for index, image in enumerate(images):
        boxes = np.asarray(find(image, index), np.float32).reshape(-1, 4)
        boxes = np.clip(boxes, 0, [image.width, image.height] * 2).astype(np.float32)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(-1)
        waiting.append(_Waiting(index, image, boxes[inside]))
        if sum(len(one.boxes) for one in waiting) >= batch_size:
            yield from _answer(model, waiting, selection, batch_size)
            waiting = []
    yield from _answer(model, waiting, selection, batch_size)


def _answer(
    model: Any, waiting: list[_Waiting], selection: Selection, batch_size: int
) -> Iterator[tuple[int, Image.Image, list[Subject]]]:
    pairs = [
        tuple(map(round_crop, cut_crops(one.image, box, model.crops, everybody=one.boxes)))
        for one in waiting
        for box in one.boxes
    ]
    said: list[tuple[Any, ...]] = []  # of each person: logits, fusion weights, attention
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        filled = part + part[-1:] * (batch_size - len(part))  # the same shape each time
        contexts, crops = (np.stack(column) for column in zip(*filled, strict=True))
        pair = normalize_crops(contexts, crops, model.crops.pixels)
        answer = jax.device_get(model(*pair, return_details=True))
        columns = [answer.logits[-1, :, 0]]
        columns += [answer.details.get(name, [None] * batch_size) for name in _SHOWN]
        said += [*zip(*columns, strict=True)][: len(part)]
    people = iter(said)
    for one in waiting:
        mine = [next(people) for _ in one.boxes]
        subjects: list[Subject] = []
        if mine:
            boxes = xyxy_to_cxcywh(one.boxes) / np.array([one.image.width, one.image.height] * 2)
            size, logits = (one.image.height, one.image.width), np.stack([row[0] for row in mine])
            found = model.decoder.by_query(logits, boxes, size, selection=selection)
            for i, subject in sorted(found.items()):
                seen: list[Any] = [None if x is None else _tuples(x) for x in mine[i][1:]]
                shown = dict(zip(_SHOWN, seen, strict=True))
                subjects.append(GivenSubject(**vars(subject), **shown))
        yield one.index, one.image, subjects


_SHOWN = ("fusion_weights", "attention")


def _tuples(values: np.ndarray) -> tuple[Any, ...]:
    return tuple(map(_tuples, values)) if values.ndim > 1 else tuple(values.tolist())
