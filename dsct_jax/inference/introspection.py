"""What the network looked at in one image, in pixels of that image: the numbers behind the
figures.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from dsct_jax.errors import UserError
from dsct_jax.inference.load import Model
from dsct_jax.inference.predict import to_model_input
from dsct_jax.postprocess import Selection, Subject
from dsct_jax.preprocess import prepare_image

# What a network has to report in `Predictions.details`.
_DETAILS = {
    "features",
    "memory",
    "reference_points",
    "sampling_locations",
    "states",
    "valid_ratios",
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One decoder layer; q subject and m context queries, s = heads x levels x points samples per
    query. Points are (x, y).
    """

    subject_points: Float[np.ndarray, "q 2"]  # reference points
    subject_samples: Float[np.ndarray, "q s 2"]
    subject_weights: Float[np.ndarray, "q s"]  # attention, the mean over heads: they sum to 1
    context_samples: Float[np.ndarray, "m s 2"]
    context_sample_weights: Float[np.ndarray, "m s"]
    # selected by distance (Eq. 6) or relevance (Eq. 7); nothing where the layer does not fuse
    spatial: Bool[np.ndarray, "q m"]
    semantic: Bool[np.ndarray, "q m"]
    context_weights: Float[np.ndarray, "q m"]  # of Eq. 8, 0 for what is not selected


@dataclasses.dataclass(frozen=True)
class Introspection:
    """One image, the people found in it, most confident first, and what each layer looked at."""

    image: Image.Image
    subjects: tuple[Subject, ...]
    queries: Int[np.ndarray, " n"]  # the subject query of each of them
    context_points: Float[np.ndarray, "m 2"]  # reference points, the same in every layer
    layers: tuple[Layer, ...]
    embeddings: Float[np.ndarray, "n d"]  # of the subjects, after the last layer
    # C3, C4, C5, ...: norm over channels, without the padding; and the same after the encoder
    backbone: tuple[Float[np.ndarray, "_ _"], ...]
    encoder: tuple[Float[np.ndarray, "_ _"], ...]


def introspect(
    model: Model, image: Image.Image, *, selection: Selection | None = None
) -> Introspection:
    """Runs the model on one RGB image and translates its details from the padded canvas into pixels
    of the image. Raises UserError where the network does not report them.
    """
    if model.crops is not None:
        raise UserError("this figure needs a network that finds its people; use a model of dsct")
    pixels, size = prepare_image(image, model.preprocessing)
    canvas = pixels.shape[0], pixels.shape[1]
    inputs = to_model_input(pixels[None], np.array([size], np.int32))
    predictions = jax.device_get(model(*inputs, return_details=True))
    details, name = predictions.details or {}, model.config["model"].get("name", "dsct")
    reported = details.keys() | {key for layer in details.get("layers", ()) for key in layer}
    if missing := ", ".join(sorted(_DETAILS - reported)):
        reason = f"this network does not report {missing}, which this figure shows"
        raise UserError(f"config.model.name={name!r}: {reason}; use a model of dsct")
    logits, boxes = predictions.logits[:, 0], predictions.boxes[:, 0]
    found = model.decoder.by_query(
        logits[-1], boxes[-1], (image.height, image.width), selection=selection or Selection()
    )
    queries = np.array([*found], np.int64)
    num_context = details["states"].shape[2] - logits.shape[1]
    points, scale = details["reference_points"][0], np.array([image.width, image.height], float)
    refined = bool(model.config["model"].get("box_refinement", False))
    subject_points = [
        boxes[i - 1, :, :2] if refined and i else points[num_context:] for i in range(len(boxes))
    ]
    ratios = scale / details["valid_ratios"][0]
    layers = [
        _layer(seen, place * scale, num_context=num_context, scale=ratios)
        for seen, place in zip(details["layers"], subject_points, strict=True)
    ]
    features = [x[0] for x in details["features"]]
    ends = np.cumsum([x.shape[0] * x.shape[1] for x in features])[:-1]
    tokens = np.split(details["memory"][0], ends)
    encoded = [x.reshape(*map_.shape[:2], -1) for x, map_ in zip(tokens, features, strict=True)]
    return Introspection(
        image=image,
        subjects=tuple(found.values()),
        queries=queries,
        context_points=points[:num_context] * scale,
        layers=tuple(layers),
        embeddings=details["states"][-1, 0, num_context:][queries],
        backbone=tuple(_activation(x, size, canvas) for x in features),
        encoder=tuple(_activation(x, size, canvas) for x in encoded),
    )


def _layer(
    seen: dict[str, np.ndarray], subject_points: np.ndarray, *, num_context: int, scale: np.ndarray
) -> Layer:
    """`scale` [l 2]: pixels of the image in the padded width and height of each level."""
    locations = seen["sampling_locations"][0]  # q n l p 2
    weights = seen["attention_weights"][0]  # q n l p
    samples = (locations * scale[None, None, :, None]).reshape(len(locations), -1, 2)
    weights = weights.reshape(len(weights), -1) / weights.shape[1]
    shape = len(locations) - num_context, num_context
    return Layer(
        subject_points=subject_points,
        subject_samples=samples[num_context:],
        subject_weights=weights[num_context:],
        context_samples=samples[:num_context],
        context_sample_weights=weights[:num_context],
        spatial=seen.get("spatial_selection", np.zeros((1, *shape), bool))[0],
        semantic=seen.get("semantic_selection", np.zeros((1, *shape), bool))[0],
        context_weights=seen.get("context_weights", np.zeros((1, *shape)))[0],
    )


def _activation(x: np.ndarray, size: tuple[int, int], canvas: tuple[int, int]) -> np.ndarray:
    """[h w d] -> [h w] norm over channels of the cells that see the image: a cell that is mostly
    padding says nothing about it.
    """
    rows, columns = (
        max(1, round(cells * side / full))
        for cells, side, full in zip(x.shape[:2], size, canvas, strict=True)
    )
    return np.linalg.norm(x[:rows, :columns].astype(np.float32), axis=-1)


def principal_components(
    x: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "2"]]:
    """The first two principal components of n >= 2 points of d >= 2 numbers, their signs being
    arbitrary, and the share of the variance of each.
    """
    centered = (x - x.mean(0)).astype(np.float64)
    left, values, _ = np.linalg.svd(centered, full_matrices=False)
    shares = values**2 / max(float((values**2).sum()), np.finfo(np.float64).tiny)
    return (left * values)[:, :2], shares[:2]
