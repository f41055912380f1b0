"""Named workloads of multi-scale deformable attention, for tests, tuner and bench."""

import dataclasses
import math

import numpy as np

from pallas_kernels.reference import SpatialShapes

# where the points lie: anywhere; the initial grid of offsets; some pixels around the reference
PATTERNS = ("uniform", "initial", "trained")


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of one call. `queries` None: one at each token, as in the encoder."""

    name: str
    spatial_shapes: SpatialShapes
    batch: int = 1
    queries: int | None = None
    heads: int = 8
    head_size: int = 32
    points: int = 4
    spread: float = 3.0  # standard deviation of the trained-like offsets, pixels
    large: bool = False  # too slow for the reference and the interpreter

    @property
    def tokens(self) -> int:
        return sum(height * width for height, width in self.spatial_shapes)

    @property
    def gathered_rows(self) -> int:
        """Rows of `head_size` values read by one forward pass: four corners per point."""
        return 4 * math.prod(self.shapes()["logits"])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of value, reference_points, offsets and logits."""
        b, q, l = self.batch, self.queries or self.tokens, len(self.spatial_shapes)
        points = (b, q, self.heads, l, self.points)
        return {
            "value": (b, self.tokens, self.heads, self.head_size),
            "reference_points": (b, q, l, 2),
            "offsets": (*points, 2),
            "logits": points,
        }

    def inputs(self, pattern: str = "trained", *, seed: int = 0) -> dict[str, np.ndarray]:
        """Random float32 arguments of `deformable_attention_from_offsets`."""
        rng, shapes = np.random.default_rng(seed), self.shapes()
        points = self._grid() if self.queries is None else rng.uniform(size=(self.queries, 2))
        points = np.broadcast_to(points[None, :, None], shapes["reference_points"])
        points = points.astype(np.float32)
        if pattern == "uniform":
            sizes = np.array(self.spatial_shapes, np.float32)[:, None, ::-1]  # (width, height)
            offsets = (rng.uniform(size=shapes["offsets"]) - points[:, :, None, :, None]) * sizes
        elif pattern == "initial":
            angles = 2 * math.pi * np.arange(self.heads) / self.heads
            directions = np.stack([np.cos(angles), np.sin(angles)], -1)
            directions /= np.abs(directions).max(-1, keepdims=True)
            steps = directions[:, None, None] * np.arange(1, self.points + 1)[:, None]
            offsets = np.broadcast_to(steps, shapes["offsets"])
        elif pattern == "trained":
            offsets = self.spread * rng.normal(size=shapes["offsets"])
        else:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
        value, logits = rng.normal(size=shapes["value"]), rng.normal(size=shapes["logits"])
        return {
            "value": value.astype(np.float32),
            "reference_points": points,
            "offsets": offsets.astype(np.float32),
            "logits": logits.astype(np.float32),
        }

    def _grid(self) -> np.ndarray:
        """(x, y) of each token's center."""
        levels = [
            np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
            for height, width in self.spatial_shapes
        ]
        return np.concatenate([np.stack(level, -1).reshape(-1, 2) for level in levels])


_800 = ((100, 134), (50, 67), (25, 34), (13, 17))  # 800 x 1066 pixels at strides 8 to 64
_480 = ((60, 80), (30, 40), (15, 20), (8, 10))  # 480 x 640

_TINY = ((6, 8), (3, 4), (2, 2), (1, 1))
_RAGGED = ((7, 3), (1, 9), (5, 5))
_DOTS = ((1, 1), (1, 1))

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("encoder_800x1066", _800, large=True),
        Workload("encoder_800x1066_batch4", _800, batch=4, large=True),
        Workload("encoder_480x640", _480, large=True),
        Workload("encoder_480x640_batch4", _480, batch=4, large=True),
        Workload("decoder_304", _800, queries=304, large=True),
        Workload("decoder_caer", _480, queries=309, large=True),
        Workload("encoder_tiny", _TINY, batch=2),
        Workload("ragged_levels", _RAGGED, batch=2, queries=20, heads=2, head_size=24, points=3),
        Workload("one_pixel_levels", _DOTS, 1, 11, heads=4, head_size=16, points=2, spread=0.7),
        Workload("out_of_bounds", ((4, 6), (2, 3)), 1, 16, heads=2, head_size=64, spread=40.0),
        Workload("odd_queries", ((5, 4),), batch=3, queries=7, heads=3, head_size=16, points=1),
    )
}
