"""Runs a StableHLO export with jax and numpy alone: python examples/run_exported.py EXPORTED
IMAGE.npy [IMAGE.npy ...]

Each IMAGE.npy is uint8 [height width 3] (RGB), already resized to fit one of the sizes of
EXPORTED/model.json (its "preprocessing" says how).
"""

import json
import pathlib
import sys

import jax
import jax.export  # reads the artifact; needs the package flatbuffers
import numpy as np


def main(directory: str, *files: str) -> None:
    folder = pathlib.Path(directory)
    about = json.loads((folder / "model.json").read_text())
    weights, prepared = dict(np.load(folder / about["weights"])), about["preprocessing"]
    pixels = [np.load(file) for file in files]
    fitting = [
        (height, width)
        for height, width in prepared["sizes"]
        if all(image.shape[0] <= height and image.shape[1] <= width for image in pixels)
    ]
    height, width = fitting[0]
    images = np.zeros((len(files), height, width, 3), np.float32)
    mask = np.ones((len(files), height, width), bool)
    for i, image in enumerate(pixels):
        h, w, _ = image.shape
        images[i, :h, :w] = (image / 255 - prepared["mean"]) / prepared["std"]
        mask[i, :h, :w] = False
    artifact = (folder / about["artifacts"][f"{height}x{width}"]).read_bytes()
    answer = jax.jit(jax.export.deserialize(bytearray(artifact)).call)(weights, images, mask)
    logits, boxes = np.asarray(answer["logits"]), np.asarray(answer["boxes"])
    for file, queries, places in zip(files, logits, boxes, strict=True):
        classes = queries[:, :-1]
        # the query that is surest to answer for a person
        best = (queries[:, -1] if about["subject_logit"] else classes.max(-1)).argmax()
        emotion = about["class_names"][classes[best].argmax()]
        print(
            f"{file}: {emotion} at (cx, cy, w, h) = {np.round(places[best], 4).tolist()}, logits "
            f"{np.round(queries[best], 4).tolist()}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
