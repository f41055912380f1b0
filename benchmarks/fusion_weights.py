"""Where the fusion's weight (Eq. 8) goes in a trained model: how sharp it is, and what each
selection gets.

    python -m benchmarks.fusion_weights --checkpoint=runs/demo1 samples/test_000*.png

One line per decoder layer, means over the people found: the largest weight of a context query, the
share of those selected by relevance alone, and the distance of the weight from the person's
reference point in shares of the image.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dsct_jax.cli import Parser, run_command, start_process
from dsct_jax.inference.introspection import Introspection, introspect
from dsct_jax.inference.load import load
from dsct_jax.inference.predict import read_rgb


def weight_measures(
    introspections: Sequence[Introspection], layer: int
) -> Iterator[tuple[float, float, float]]:
    """(largest weight, share of the semantic selection alone, mean distance) of each person found;
    none for a layer that does not fuse.
    """
    for one in introspections:
        seen = one.layers[layer]
        size = np.array([one.image.width, one.image.height])
        for query in one.queries:
            weights = seen.context_weights[query]
            if weights.sum() > 0:
                distances = np.linalg.norm(
                    (one.context_points - seen.subject_points[query]) / size, axis=-1
                )
                semantic = weights[seen.semantic[query] & ~seen.spatial[query]].sum()
                yield float(weights.max()), float(semantic), float((weights * distances).sum())


def run(argv: Sequence[str] | None) -> None:
    """Runs the command."""
    parser = Parser(prog="python -m benchmarks.fusion_weights", description=__doc__)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--checkpoint", required=True, help="run directory or .safetensors file")
    arguments = parser.parse_args(argv)
    model = load(arguments.checkpoint)
    introspections = [introspect(model, read_rgb(file)) for file in arguments.images]
    print(f"{'layer':<8}{'people':>8}{'largest':>10}{'semantic':>10}{'distance':>10}")
    for layer in range(len(introspections[0].layers)):
        measures = np.array(list(weight_measures(introspections, layer))).reshape(-1, 3)
        means = measures.mean(0) if len(measures) else np.full(3, np.nan)
        print(f"{layer + 1:<8}{len(measures):>8}" + "".join(f"{mean:>10.3f}" for mean in means))


if __name__ == "__main__":
    start_process()
    sys.exit(run_command(lambda: run(None)))
