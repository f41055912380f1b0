"""An archive of images through Ray Data: a model in each actor, a row of Parquet for each image.

    pip install 'ray[data]'
    python examples/predict_with_ray.py photos/ --checkpoint=runs/demo --output=found

`dsct predict-many` does the same without Ray, and goes on where it was stopped.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import ray

import dsct_jax


class Predictor:
    """A batch of paths -> their people, as JSON; the model is loaded once per actor."""

    def __init__(self, checkpoint: str):
        self.model = dsct_jax.load(checkpoint)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        paths = batch["item"].tolist()
        answers = dsct_jax.predict(self.model, paths)
        people = [json.dumps([dataclasses.asdict(one) for one in found]) for found in answers]
        return {"path": paths, "people": people}


def main() -> None:
    """Predicts every .jpg and .png below the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--actors", type=int, default=1)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    paths = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".png"))
    checkpoint, output = (str(Path(p).resolve()) for p in (arguments.checkpoint, arguments.output))
    ray.data.from_items(paths).map_batches(
        Predictor,
        fn_constructor_args=(checkpoint,),
        batch_size=16,
        compute=ray.data.ActorPoolStrategy(size=arguments.actors),
    ).write_parquet(output)


if __name__ == "__main__":
    main()
