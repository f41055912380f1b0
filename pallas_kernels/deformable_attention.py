"""Multi-scale deformable attention: the one public door, over several implementations.

Each query samples `p` points on each of `l` feature levels around its reference point, bilinearly,
and sums the samples by their weights, for every head (Zhu et al., Deformable DETR, Eq. 3).
`deformable_attention` takes locations and weights; `deformable_attention_from_offsets`, which the
model uses, takes what the projections produce and does the softmax and the location arithmetic
inside.

Implementations: `reference` (plain jax.numpy, the definition), `xla` (fastest portable form; lowers
for every platform and for jax.export), `grid_sample` (what ONNX has an operation for) and
`pallas_gpu` (GPU kernels). Asked for by name, one runs
or raises with the reason. `implementation=None` picks when the call is traced: `pallas_gpu` where
jax runs on a GPU and the kernels support the arguments, else `xla`. `chosen_implementation` returns
which, and each is logged once.

Contract of all of them:
- Locations are (x, y), 0 and 1 the outer edges of a level; pixel centers are half-way: pixel =
  location * size - 0.5. Outside the map lie zeros.
- Locations, softmax and sums are float32 whatever the type of `value` (float64 if `value` is). The
  result has the type of `value`.
- A location that is not finite, or far outside, contributes zero and receives a zero gradient.
"""

import logging
from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels import grid_sample, pallas_gpu, reference, xla
from pallas_kernels.reference import SpatialShapes

IMPLEMENTATIONS = {
    "reference": reference,
    "xla": xla,
    "grid_sample": grid_sample,
    "pallas_gpu": pallas_gpu,
}

_log = logging.getLogger(__name__)
_logged: set[str] = set()


def chosen_implementation(value: Any, offsets: Any, implementation: str | None = None) -> str:
    """Name of the implementation that would run for these arguments (arrays or
    jax.ShapeDtypeStruct) where jax runs now.

    Raises:
        ValueError: an unknown name, or an implementation that cannot run here, with the reason.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation must be one of {names} or None, got {implementation!r}")
    if implementation in ("reference", "xla", "grid_sample"):
        return implementation
    reason = pallas_gpu.unsupported_reason(value, offsets, platform=_platform())
    if implementation == "pallas_gpu" and reason:
        raise ValueError(f"implementation pallas_gpu cannot be used: {reason}")
    return "xla" if reason else "pallas_gpu"


def _platform() -> str:
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.default_backend() if device is None else getattr(device, "platform", device)


def deformable_attention(
    value: Float[Array, "b s n d"],
    spatial_shapes: SpatialShapes,
    sampling_locations: Float[Array, "b q n l p 2"],
    attention_weights: Float[Array, "b q n l p"],
    *,
    implementation: str | None = None,
) -> Float[Array, "b q n*d"]:
    """Attend to `value` at `sampling_locations`.

    Args:
        value: the memory, levels concatenated, each row-major; s = sum of height * width. float32,
            bfloat16 or float64.
        spatial_shapes: static ((height, width), ...) of the l levels.
        sampling_locations: (x, y) in [0, 1] of each level's padded map.
        attention_weights: weight of each sample; usually sums to one over (l p), which is not
            required.
        implementation: a name of IMPLEMENTATIONS, or None for the best here.

    Raises:
        ValueError: shapes that do not fit together, or an implementation that is unknown or cannot
            run here.
    """
    _check(value, spatial_shapes, sampling_locations, attention_weights)
    chosen = _choose(value, sampling_locations, implementation)
    return chosen.deformable_attention(value, spatial_shapes, sampling_locations, attention_weights)


def deformable_attention_from_offsets(
    value: Float[Array, "b s n d"],
    spatial_shapes: SpatialShapes,
    reference_points: Float[Array, "b q l 2"],
    offsets: Float[Array, "b q n l p 2"],
    logits: Float[Array, "b q n l p"],
    *,
    implementation: str | None = None,
) -> Float[Array, "b q n*d"]:
    """Attend to `value` around `reference_points`: locations reference_points + offsets / (width,
    height), weights softmax(logits) over (l p).

    Args:
        value, spatial_shapes, implementation: as in `deformable_attention`, with its errors.
        reference_points: (x, y) in [0, 1] of each level's padded map (scaled by the valid ratios
            where images are padded).
        offsets: (x, y) in pixels of each level.
        logits: before the softmax, which runs over levels and points together, in float32.
    """
    _check(value, spatial_shapes, offsets, logits)
    b, q, _, l = logits.shape[:4]
    wanted, given = (b, q, l, 2), reference_points.shape
    if given != wanted:
        raise ValueError(f"reference_points must be [b q l 2] = {wanted}, got {given}")
    return _choose(value, offsets, implementation).deformable_attention_from_offsets(
        value, spatial_shapes, reference_points, offsets, logits
    )


def _choose(value: jax.Array, offsets: jax.Array, implementation: str | None):
    name = chosen_implementation(value, offsets, implementation)
    if name not in _logged:
        _logged.add(name)
        _log.info("deformable attention: %s on %s", name, _platform())
    return IMPLEMENTATIONS[name]


def _check(
    value: jax.Array, spatial_shapes: SpatialShapes, points: jax.Array, weights: jax.Array
) -> None:
    if value.ndim != 4 or points.ndim != 6 or points.shape[-1] != 2:
        shapes = f"{value.shape} and {points.shape}"
        raise ValueError(f"value must be [b s n d] and points [b q n l p 2], got {shapes}")
    b, s, n, _ = value.shape
    if weights.shape != points.shape[:-1]:
        raise ValueError(f"weights must be [b q n l p] = {points.shape[:-1]}, got {weights.shape}")
    if (points.shape[0], points.shape[2], points.shape[3]) != (b, n, len(spatial_shapes)):
        wanted = f"agree with value {value.shape} in b and n, and have l = {len(spatial_shapes)}"
        raise ValueError(f"points {points.shape} must {wanted} levels")
    tokens = sum(height * width for height, width in spatial_shapes)
    if isinstance(tokens, int) and tokens != s:
        held = f"spatial_shapes {spatial_shapes} hold {tokens} tokens"
        raise ValueError(f"{held}, but value has s = {s}")
