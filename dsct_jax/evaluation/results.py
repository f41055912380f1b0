"""What a model said about a split and the people annotated in it, as arrays and as a compact file
(predictions_<split>.npz).
"""

import dataclasses
import functools
import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

from dsct_jax.boxes import to_pixels
from dsct_jax.errors import UserError
from dsct_jax.postprocess import Decoder

_FORMAT = 2  # of the file; a number that grows when an older reader would misunderstand
_ARRAYS = ("image_ids", "sizes", "logits", "boxes", "people_per_image", "gt_boxes", "gt_labels")

# Images on the host, and the last layer's logits [b q k+1] and boxes [b q 4] of each.
Shown = tuple[Any, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ImageResult:
    """What the last decoder layer says about one image, and the people annotated in it."""

    image_id: int
    logits: Float[np.ndarray, "q c"]  # c = k + 1
    boxes: Float[np.ndarray, "q 4"]  # (cx, cy, w, h) in [0, 1] of the image
    size: tuple[int, int]  # (height, width) of the image in pixels
    gt_boxes: Num[np.ndarray, "t 4"]  # (x1, y1, x2, y2) in pixels
    gt_labels: Shaped[np.ndarray, "t k"]  # multi-hot or one-hot; zeros = a person without label


@dataclasses.dataclass(frozen=True)
class ResultsInfo:
    """What the arrays of a split mean."""

    decoder: Decoder  # how the outputs are read, and what was fitted to these weights
    protocol: str = "custom"  # which data and boxes: different ones cannot be compared
    split: str = ""
    checkpoint: str = ""  # where the weights came from, such as "step 3"
    # whose boxes a two-stage network saw: "given" or "found by ..."; "": it finds its people itself
    boxes: str = ""


@dataclasses.dataclass(frozen=True)
class SplitResults:
    """The results of n images with m people, in the order of the images."""

    about: ResultsInfo
    image_ids: Int[np.ndarray, " n"]
    sizes: Int[np.ndarray, "n 2"]  # (height, width) in pixels
    logits: Float[np.ndarray, "n q c"]  # c = k + 1
    boxes: Float[np.ndarray, "n q 4"]  # (cx, cy, w, h) in [0, 1] of the image
    people_per_image: Int[np.ndarray, " n"]
    gt_boxes: Float[np.ndarray, "m 4"]  # (x1, y1, x2, y2) in pixels
    gt_labels: Bool[np.ndarray, "m k"]

    def __post_init__(self) -> None:
        k, image = len(self.about.decoder.class_names), self.image_ids[0]
        logits, classes = self.logits.shape[-1], self.gt_labels.shape[-1]
        if (logits, classes) != (k + 1, k):
            raise UserError(
                f"image {image}: {logits} logits and labels of {classes} classes do not fit the "
                f"{k} class names: expected {k + 1} and {k}"
            )
        counts = int(self.people_per_image.sum()), len(self.gt_boxes), len(self.gt_labels)
        if len(set(counts)) > 1:
            raise UserError(
                f"{counts[0]} people are announced, {counts[1]} have a box, {counts[2]} a label row"
            )
        finite = np.isfinite(self.logits).all((1, 2)) & np.isfinite(self.boxes).all((1, 2))
        if not finite.all():
            image = self.image_ids[np.argmin(finite)]
            raise FloatingPointError(f"image {image}: the predicted logits or boxes are not finite")

    @functools.cached_property
    def image_of_person(self) -> Int[np.ndarray, " m"]:
        """Position of each person's image."""
        return np.repeat(np.arange(len(self.image_ids)), self.people_per_image)

    @functools.cached_property
    def pixel_boxes(self) -> Float[np.ndarray, "n q 4"]:
        """The predicted boxes as (x1, y1, x2, y2) in pixels."""
        return to_pixels(self.boxes, self.sizes[:, None])

    def gt_boxes_by_image(self) -> list[np.ndarray]:
        """The annotated boxes [t 4] of each image."""
        return np.split(self.gt_boxes, self.people_per_image.cumsum()[:-1])

    def save(self, path: Path) -> None:
        """Writes one compressed .npz without pickled objects, whole or not at all."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        about = json.dumps({"format": _FORMAT, **dataclasses.asdict(self.about)})
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            np.savez_compressed(file, about=np.array(about), **arrays)
        temporary.replace(path)


def stack_results(results: Sequence[ImageResult], about: ResultsInfo) -> SplitResults:
    """Image after image -> arrays. Raises UserError for no image or one that is there twice."""
    if not results:
        nothing = "nothing to evaluate: there is no image"
        raise UserError(f"{nothing}; check the annotation file of the split")
    image, times = Counter(result.image_id for result in results).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"image {image} is among the results {times} times; every image must be counted once"
        )
    queries = {len(result.boxes) for result in results}
    if queries == {0} or len(queries) > 1:
        wanted = "every image needs the same number of predicted boxes, at least one"
        raise ValueError(f"{wanted}; there are {sorted(queries)}")
    return SplitResults(
        about=about,
        image_ids=np.array([result.image_id for result in results], np.int64),
        sizes=np.array([result.size for result in results], np.int64),
        logits=np.stack([result.logits for result in results]),
        boxes=np.stack([result.boxes for result in results]),
        people_per_image=np.array([len(result.gt_boxes) for result in results], np.int64),
        gt_boxes=np.concatenate([result.gt_boxes for result in results]).astype(np.float32),
        gt_labels=np.concatenate([result.gt_labels for result in results]) > 0.5,
    )


def read_results(path: Path) -> SplitResults:
    """Reads what `SplitResults.save` wrote. Raises UserError: missing, damaged or another file."""
    again = "run train.py --mode=eval again"
    if not path.is_file():
        writes = "train.py --mode=eval writes predictions_<split>.npz into the --workdir"
        raise UserError(f"{path}: no such file; {writes}")
    try:
        with np.load(path, allow_pickle=False) as file:
            about: dict[str, Any] = json.loads(str(file["about"]))
            arrays = {name: file[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        damaged = f"not a file of predictions, or damaged ({error})"
        raise UserError(f"{path}: {damaged}; {again}") from None
    version = about.pop("format", None)
    if version == 1:  # older: the classes stood beside the rest, and nothing fitted was kept
        names = about.pop("class_names"), about.pop("multi_label"), about.pop("subject_logit")
        decoder = Decoder(tuple(names[0]), *names[1:])
    elif version == _FORMAT:
        decoder = Decoder.from_dict(about.pop("decoder"), where=str(path))
    else:
        raise UserError(f"{path}: written by another version of this program; {again}")
    return SplitResults(about=ResultsInfo(decoder, **about), **arrays)
