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
    images = [np.load(file) for file in files]
    fits = [
        size
        for size in prepared["sizes"]
        if all(p.shape[0] <= size[0] and p.shape[1] <= size[1] for p in images)
    ]
    height, width = fits[0]
    images, mask = (
        np.zeros((len(files), height, width, 3), np.float32),
        np.ones((len(files), height, width), bool),
    )
    for i, image in enumerate(images):
        h, w, _ = image.shape
        images[i, :h, :w], mask[i, :h, :w] = (
            (image / 255 - prepared["mean"]) / prepared["std"],
            False,
        )
    exported = jax.export.deserialize(
        bytearray((folder / about["artifacts"][f"{height}x{width}"]).read_bytes())
    )
    answer = jax.jit(exported.call)(weights, images, mask)
    logits, boxes = np.asarray(answer["logits"]), np.asarray(answer["boxes"])
    for file, subjects, places in zip(files, logits, boxes, strict=True):
        query = (
            subjects[:, -1].argmax()
            if about["subject_logit"]
            else subjects[:, :-1].max(-1).argmax()
        )  # the surest subject
        emotion = about["class_names"][subjects[query, :-1].argmax()]
        print(
            f"{file}: {emotion} at (cx, cy, w, h) = {np.round(places[query], 4).tolist()}, logits "
            f"{np.round(subjects[query], 4).tolist()}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
