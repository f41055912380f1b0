"""What the network looked at in one image, in pixels of that image: the numbers behind the figures."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from dsct_jax.batch import padding_mask
from dsct_jax.boxes import cxcywh_to_xyxy
from dsct_jax.inference.load import Model
from dsct_jax.postprocess import Selection, Subject, has_subject_logit, select_subjects
from dsct_jax.preprocess import normalize, prepare_image


@dataclasses.dataclass(frozen=True)
class Layer:
    """One decoder layer; q subject and m context queries, s = heads x levels x points samples a
    query. Points are (x, y).
    """

    subject_points: Float[np.ndarray, "q 2"]  # reference points
    subject_samples: Float[np.ndarray, "q s 2"]
    subject_weights: Float[
        np.ndarray, "q s"
    ]  # attention weights, the mean over heads: they sum to 1
    context_samples: Float[np.ndarray, "m s 2"]
    context_sample_weights: Float[np.ndarray, "m s"]
    spatial: Bool[
        np.ndarray, "q m"
    ]  # selected by distance (Eq. 6); nothing where the layer does not fuse
    semantic: Bool[np.ndarray, "q m"]  # selected by relevance (Eq. 7)
    context_weights: Float[np.ndarray, "q m"]  # of Eq. 8, 0 for what is not selected


@dataclasses.dataclass(frozen=True)
class Introspection:
    """One image, the people found in it, surest first, and what each layer looked at for them."""

    image: Image.Image
    subjects: tuple[Subject, ...]
    queries: Int[np.ndarray, "n"]  # the subject query of each of them
    context_points: Float[np.ndarray, "m 2"]  # reference points, the same in every layer
    layers: tuple[Layer, ...]
    embeddings: Float[np.ndarray, "n d"]  # of the subjects, after the last layer
    backbone: tuple[
        Float[np.ndarray, "_ _"], ...
    ]  # activation of C3, C4, C5, ...: norm over channels, without the padding
    encoder: tuple[Float[np.ndarray, "_ _"], ...]  # the same maps after the encoder


def introspect(
    model: Model, image: Image.Image, *, selection: Selection | None = None
) -> Introspection:
    """Runs the model on one RGB image and translates its details from the padded canvas into pixels
    of the image.
    """
    pixels, (height, width) = prepare_image(image, model.preprocessing)
    canvas = pixels.shape[:2]
    mask = padding_mask(jnp.array([[height, width]]), *canvas)
    predictions = jax.device_get(
        model(normalize(jnp.asarray(pixels)[None], mask), mask, return_details=True)
    )
    details, logits, boxes = predictions.details, predictions.logits[:, 0], predictions.boxes[:, 0]
    subject_logit = has_subject_logit(
        multi_label=model.multi_label, class_loss=model.config["loss"]["class_loss"]
    )
    names: dict[str, Any] = {
        "class_names": model.class_names,
        "multi_label": model.multi_label,
        "subject_logit": subject_logit,
    }
    size = image.height, image.width
    fitted: dict[str, Any] = {
        "thresholds": model.thresholds,
        "min_confidence": model.min_confidence,
    }
    subjects = select_subjects(
        logits[-1], boxes[-1], size, selection=selection or Selection(), **fitted, **names
    )
    found = np.array([subject.box for subject in subjects]).reshape(-1, 1, 4)
    scale = np.array([image.width, image.height], np.float32)
    corners = np.clip(cxcywh_to_xyxy(boxes[-1]), 0, 1) * np.tile(scale, 2)
    queries = np.abs(found - corners).sum(-1).argmin(-1).astype(np.int64)
    num_context = details["states"].shape[2] - logits.shape[1]
    points = details["reference_points"][0]
    refined = bool(model.config["model"].get("box_refinement", False))
    subject_points = [
        boxes[i - 1, :, :2] if refined and i else points[num_context:] for i in range(len(boxes))
    ]
    layers = [
        _layer(
            seen, place * scale, num_context=num_context, scale=scale / details["valid_ratios"][0]
        )
        for seen, place in zip(details["layers"], subject_points, strict=True)
    ]
    activations = [_activation(x[0], (height, width), canvas) for x in details["features"]]
    sizes = [x.shape[1:3] for x in details["features"]]
    ends = np.cumsum([h * w for h, w in sizes])[:-1]
    encoded = [
        tokens.reshape(*shape, -1)
        for tokens, shape in zip(np.split(details["memory"][0], ends), sizes, strict=True)
    ]
    return Introspection(
        image=image,
        subjects=tuple(subjects),
        queries=queries,
        context_points=points[:num_context] * scale,
        layers=tuple(layers),
        embeddings=details["states"][-1, 0, num_context:][queries],
        backbone=tuple(activations),
        encoder=tuple(_activation(x, (height, width), canvas) for x in encoded),
    )


def _layer(
    seen: dict[str, np.ndarray], subject_points: np.ndarray, *, num_context: int, scale: np.ndarray
) -> Layer:
    """`scale` [l 2]: pixels of the image in the padded width and height of each level."""
    locations, weights = (
        seen["sampling_locations"][0],
        seen["attention_weights"][0],
    )  # q n l p 2, q n l p
    samples = (locations * scale[None, None, :, None]).reshape(len(locations), -1, 2)
    weights = weights.reshape(len(weights), -1) / weights.shape[1]
    nothing = np.zeros((len(locations) - num_context, num_context))
    return Layer(
        subject_points=subject_points,
        subject_samples=samples[num_context:],
        subject_weights=weights[num_context:],
        context_samples=samples[:num_context],
        context_sample_weights=weights[:num_context],
        spatial=seen["spatial_selection"][0] if "spatial_selection" in seen else nothing > 0,
        semantic=seen["semantic_selection"][0] if "semantic_selection" in seen else nothing > 0,
        context_weights=seen["context_weights"][0] if "context_weights" in seen else nothing,
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
    """The first two principal components of n points, and the share of the variance of each. Needs
    n >= 2; the sign of a component is arbitrary.
    """
    centred = x - x.mean(0)
    left, values, _ = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    scores = np.zeros((len(x), 2))
    shares = np.zeros(2)
    kept = min(2, len(values))
    scores[:, :kept] = left[:, :kept] * values[:kept]
    shares[:kept] = np.square(values[:kept]) / max(
        float(np.square(values).sum()), np.finfo(np.float64).tiny
    )
    return scores, shares
