"""Stand-ins for the networks of Table 13 that the built-in scenes can use: three small ResNets that
learn what the scenes hold beside emotions, saved under the names of the published files.

    python -m benchmarks.scene_modalities --output=runs/scene_modalities --steps=400
    python -m benchmarks.ablate --table=13 --config=configs/demo.py --output=runs/table13 \
        --config.model.modality_backbone=small --config.model.modality_pyramid=False \
        "--config.model.modalities=('scene','semantic','instance')" \
        "--config.model.modality_weights=('DIR/scene.safetensors', ...)"

scene: the setting; semantic: the objects that are held; instance: the number of people. Their
images are in no split.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.tables import make_parser, table
from data.readers.scene_drawing import Scene
from data.readers.scenes import SCENE_CLASSES, SceneImage, make_scene
from dsct_jax.batch import padding_mask
from dsct_jax.cli import progress, run_command
from dsct_jax.model.backbone import BACKBONES, ResNet
from dsct_jax.model.build import flatten
from dsct_jax.model.layers import Linear, NormStatistic
from dsct_jax.model.modalities import MODALITIES, PREFIX
from dsct_jax.preprocess import normalize
from dsct_jax.weights.modalities import LAYOUTS
from dsct_jax.weights.rules import to_torch
from dsct_jax.weights.tensor_files import write_safetensors

BACKBONE, BATCH, SIDE = "small", 32, 96
SPLIT, TRAINED, TESTED = 17, 2000, 400  # a split of their own
FACTS = (len(SCENE_CLASSES) + 1, len(SCENE_CLASSES), 4)  # logits of each modality


def facts(scene: Scene, name: str) -> np.ndarray:
    """What a modality is asked for, as a row of zeros and ones."""
    if name == "scene":
        return np.eye(FACTS[0], dtype=np.float32)[("", *SCENE_CLASSES).index(scene.setting)]
    if name == "semantic":
        held = {person.held for person in scene.people}
        return np.array([one in held for one in SCENE_CLASSES], np.float32)
    return np.eye(FACTS[2], dtype=np.float32)[len(scene.people) - 1]


class Classifier(nnx.Module):
    """A ResNet whose last map, averaged, is read by one layer."""

    def __init__(self, outputs: int, rngs: nnx.Rngs):
        self.body = ResNet(BACKBONES[BACKBONE], norm="frozen_batch", rngs=rngs)
        self.head = Linear(BACKBONES[BACKBONE].channels[-1], outputs, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        sizes = jnp.full((len(pixels), 2), SIDE)
        images = normalize(pixels, padding_mask(sizes, SIDE, SIDE))
        return self.head(self.body(images)[-1].mean((1, 2)))


def train(name: str, pixels: np.ndarray, labels: np.ndarray, steps: int) -> tuple[dict, float]:
    """(its arrays by path, share of right answers on the last TESTED images)."""
    model = Classifier(labels.shape[1], nnx.Rngs(0))
    graph, params, statistics = nnx.split(model, nnx.Param, NormStatistic)
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, steps))
    state = optimizer.init(params)

    def loss(params, pixels, labels):
        logits = nnx.merge(graph, params, statistics)(pixels)
        if name == "semantic":
            return optax.sigmoid_binary_cross_entropy(logits, labels).mean()
        return optax.softmax_cross_entropy(logits, labels).mean()

    @jax.jit
    def step(params, state, pixels, labels):
        updates, state = optimizer.update(jax.grad(loss)(params, pixels, labels), state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    for _ in progress(range(steps), total=steps, what=name, unit="step"):
        chosen = rng.integers(TRAINED, size=BATCH)
        params, state = step(params, state, pixels[chosen], labels[chosen])
    answers = np.asarray(jax.jit(nnx.merge(graph, params, statistics))(pixels[TRAINED:]))
    wanted = labels[TRAINED:]
    right = (answers > 0) == wanted if name == "semantic" else answers.argmax(1) == wanted.argmax(1)
    body = (nnx.to_pure_dict(values)["body"] for values in (params, statistics))
    arrays = {path: value for values in body for path, value in flatten(values).items()}
    return {f"{PREFIX}{name}/body/{path}": value for path, value in arrays.items()}, right.mean()


def run(argv: list[str] | None = None) -> None:
    """Runs the command."""
    parser = make_parser("benchmarks.scene_modalities", __doc__ or "")
    parser.add_argument("--steps", type=int, default=400, help="of training, of each")
    arguments = parser.parse_args(argv)
    folder = arguments.output or Path("runs/scene_modalities")
    count = TRAINED + TESTED
    drawn = (SceneImage(SPLIT, index)() for index in range(count))
    images = progress(drawn, total=count, what="drawing")
    pixels = np.stack([np.asarray(image.resize((SIDE, SIDE))) for image in images])
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in MODALITIES:
        labels = np.stack([facts(make_scene(SPLIT, index), name) for index in range(count)])
        arrays, right = train(name, pixels, labels, arguments.steps)
        path = folder / f"{name}.safetensors"
        write_safetensors(path, to_torch(arrays, layout=LAYOUTS[name]), {})
        frequent = max(labels.mean(0).max(), (1 - labels).mean() if name == "semantic" else 0)
        rows.append([name, f"{100 * right:.1f}", f"{100 * frequent:.1f}", path])
    print(table(["stand-in", "right, %", "most frequent, %", "file"], rows))


if __name__ == "__main__":
    sys.exit(run_command(run))
