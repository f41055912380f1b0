"""Confidence intervals by resampling images: the people of one image are no independent observations, so images are drawn, not people."""

import numpy as np
from jaxtyping import Float, Int, Num

LEVEL = 0.95


def image_weights(num_images: int, *, resamples: int, seed: int) -> Int[np.ndarray, "r n"]:
    """How often each image stands in each resample of as many images, drawn with replacement."""
    rng = np.random.default_rng(seed)
    draws = (np.bincount(rng.integers(0, num_images, num_images), minlength=num_images) for _ in range(resamples))
    return np.stack([counts.astype(np.int16) for counts in draws])


def interval(values: Num[np.ndarray, "r"]) -> list[float]:
    """[low, high] between which the central 95 % of the resamples lie (percentile bootstrap); resamples that are NaN do not count."""
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def mean_over_present(values: Float[np.ndarray, "r k"], present: Num[np.ndarray, "r k"], *, of: int) -> Float[np.ndarray, "r"]:
    """Mean over the classes that have people in a resample, times the share of all k classes that have people in the split.

    A rare class that a resample happens to miss would else count as AP 0 there, and the interval of a mAP could lie below the mAP. NaN where a
    resample has nobody.

    Args:
        present: anything that is more than 0 where the class has people.
        of: how many classes have people in the split.
    """
    exists = present > 0
    number = exists.sum(-1)
    means = (values * exists).sum(-1) / np.maximum(number, 1) * (of / values.shape[-1])
    return np.where(number > 0, means, np.nan)
