"""Runs a StableHLO export with jax and numpy alone:

    python examples/run_exported.py EXPORTED IMAGE.npy [IMAGE.npy ...]

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
    about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    weights, prepared = dict(np.load(folder / about["weights"])), about["preprocessing"]
    images = [np.load(file) for file in files]
    rows, columns = (max(image.shape[axis] for image in images) for axis in (0, 1))
    height, width = next((h, w) for h, w in prepared["sizes"] if rows <= h and columns <= w)
    batch = np.zeros((len(files), height, width, 3), np.float32)
    mask = np.ones((len(files), height, width), bool)  # True: padding
    for i, image in enumerate(images):
        h, w, _ = image.shape
        batch[i, :h, :w] = (image / 255 - prepared["mean"]) / prepared["std"]
        mask[i, :h, :w] = False
    artifact = folder / about["artifacts"][f"{height}x{width}"]
    exported = jax.export.deserialize(bytearray(artifact.read_bytes()))
    answer = jax.jit(exported.call)(weights, batch, mask)
    logits, boxes = np.asarray(answer["logits"]), np.asarray(answer["boxes"])
    for file, subjects, places in zip(files, logits, boxes, strict=True):
        by_class = subjects[:, :-1]
        confidences = subjects[:, -1] if about["subject_logit"] else by_class.max(-1)
        query = confidences.argmax()
        emotion = about["class_names"][by_class[query].argmax()]
        box, values = (np.round(x[query], 4).tolist() for x in (places, subjects))
        print(f"{file}: {emotion} at (cx, cy, w, h) = {box}, logits {values}")


if __name__ == "__main__":
    main(*sys.argv[1:])
