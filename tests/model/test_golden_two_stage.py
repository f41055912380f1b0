"""The two-stage networks against their code: features, attention, fusion and answers of one forward
pass; losses, gradients, statistics and steps of training (tests/golden/two_stage; sizes are read
from the files).
"""

import math
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsct_jax.config import read_config
from dsct_jax.crops import normalize_crops
from dsct_jax.model.build import Network, network_config
from dsct_jax.weights.layouts import detect_layout, layout_of
from dsct_jax.weights.rules import from_torch, to_torch

CONFIGS = Path(__file__).parents[2] / "configs"


def recipe(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A weight as the golden files' README draws it."""
    rs = np.random.RandomState(zlib.crc32(name.encode()) ^ seed)
    leaf = name.replace("/", ".").rsplit(".", 1)[-1]
    # the output axis: Keras' kernels have it last
    outputs = shape[-1] if leaf == "kernel" else shape[0]

    def normal(scale):
        return rs.standard_normal(shape) * scale

    if leaf in ("running_var", "moving_variance"):
        x = rs.uniform(0.5, 1.5, shape)
    elif leaf in ("running_mean", "moving_mean"):
        x = normal(0.1)
    elif len(shape) == 4:
        x = normal(math.sqrt(2 / (math.prod(shape) / outputs)))
    elif len(shape) == 2:
        scale = math.sqrt(1 / (math.prod(shape) / outputs))
        x = normal(scale) * (4 if "attention_fc2" in name else 1)
    elif leaf in ("bias", "beta"):
        x = normal(0.1)
    elif "bn3" in name or "downsample" in name:
        x = rs.uniform(0.2, 0.6, shape)
    else:
        x = rs.uniform(0.5, 1.2, shape)
    return x.astype(np.float16).astype(np.float32)


def weights_of(arrays: dict[str, np.ndarray], names: str, shapes: str) -> dict[str, np.ndarray]:
    seed = int(arrays["weight_seed"])
    pairs = zip(arrays[names].tolist(), arrays[shapes].tolist(), strict=True)
    pairs = [(name, text) for name, text in pairs if text != "scalar"]  # counted batches
    sizes = {name: tuple(map(int, text.split("x"))) for name, text in pairs}
    return {name: recipe(name, shape, seed) for name, shape in sizes.items()}


class Case:
    """A file, a configuration, and the network of both with the weights of the recipe."""

    def __init__(self, arrays: dict[str, np.ndarray], state: dict[str, np.ndarray], **model: Any):
        config = read_config(CONFIGS / f"{model.pop('config')}.py")
        self.config, self.arrays, self.state = config, arrays, state
        section = config["model"] | model
        self.network = Network(network_config(section, model.get("classes", 0) or self.classes))
        self.layout = layout_of(self.network.config)
        shapes = self.network.param_shapes | self.network.norm_stats_shapes
        loaded = from_torch(state, shapes, layout=self.layout)
        self.params = {name: jnp.asarray(loaded[name]) for name in self.network.param_shapes}
        self.norm_stats = {
            name: jnp.asarray(loaded[name]) for name in self.network.norm_stats_shapes
        }

    @property
    def classes(self) -> int:
        """Of the last layer, which has a bias."""
        last = ("fusion_net.fc2.bias", "final_classify/bias", "final_classify.bias")
        names = [name for name in (*last, "fusion.fc_cat.bias") if name in self.state]
        return len(self.state[names[0]])

    def forward(self, contexts: np.ndarray, subjects: np.ndarray) -> tuple[np.ndarray, dict]:
        """Class logits and details in float64: what a CPU's instructions make of float32 differs by
        more than the tolerances. Float32 must give the same logits.
        """
        pair = jnp.asarray(contexts), jnp.asarray(subjects)
        inputs = normalize_crops(*pair, self.network.config.pixels)

        @jax.jit
        def run(params, norm_stats, inputs):
            network = self.network.bind(params, norm_stats)
            return network(*inputs, return_details=True)

        values = jax.device_get((self.params, self.norm_stats, inputs))
        single = jax.device_get(run(*values).logits)
        with jax.enable_x64(True):
            double = jax.tree.map(lambda x: np.asarray(x, np.float64), values)
            answer = jax.device_get(run(*double))
        assert answer.logits.dtype == np.float64
        close(single, answer.logits, 1e-5)
        details = answer.details | {"ratings": answer.ratings}
        return answer.logits[-1, :, 0, :-1], details


@pytest.fixture(scope="module")
def golden_file(pytestconfig):
    def read(name: str) -> dict[str, np.ndarray]:
        path = pytestconfig.getoption("--golden-two-stage") / f"{name}.npz"
        with np.load(path, allow_pickle=False) as file:
            return dict(file)

    return read


def close(found, expected, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance)


def close_map(found, expected) -> None:
    """Maps and vectors whose values reach 10, for which the README names no tolerance: 1e-5 of the
    largest.
    """
    close(found, expected, 1e-5 * max(1, float(np.abs(expected).max())))


def glamor_case(arrays, **model: Any) -> Case:
    state = weights_of(arrays, "variable_names", "variable_shapes")
    widths = [
        state[f"FaceEncodingNet/blocks/{i}/conv/bias"].size
        for i in range(sum("FaceEncodingNet" in n and n.endswith("kernel") for n in state))
    ]
    sizes = {"widths": tuple(widths), "hidden_dim": state["final_fc1/bias"].size}
    return Case(arrays, state, config="glamor_net", **sizes, **model)


def caer_case(arrays, **model: Any) -> Case:
    state = weights_of(arrays, "names", "shapes")
    face = "two_stream_net.face_encoding_module.convs.{}.bias"
    number = sum(name == face.format(i) for name in state for i in range(99))
    widths = tuple(state[face.format(i)].size for i in range(number))
    sizes = {"widths": widths, "hidden_dim": state["fusion_net.fc1.bias"].size}
    return Case(arrays, state, config="caer_net_s", **sizes, **model)


def emo_case(arrays, name: str) -> Case:
    state = weights_of(arrays, "names", "shapes")
    sizes = {"ratings": True, "hidden_dim": state["fusion.fc1.bias"].size}
    encoder, config = name.removeprefix("emo_net_"), "emo_net"
    return Case(arrays, state, config=config, encoder=encoder, **sizes)


def test_golden_glamor_net(golden_file):
    case = glamor_case(arrays := golden_file("glamor_original"))
    trained = sum(x.size for x in case.params.values())
    assert trained == arrays["num_trainable"]
    assert trained + sum(x.size for x in case.norm_stats.values()) == arrays["num_params"]
    logits, seen = case.forward(arrays["contexts_u8"], arrays["faces_u8"])
    for stream in ("face", "context"):
        for i, x in enumerate(seen[f"{stream}_features"]):
            close(x.mean((1, 2)), arrays[f"eval/{stream}_block{i}_channel_mean"], 1e-5)
            close(x[:, :2, :2, :8], arrays[f"eval/{stream}_block{i}_corner"], 1e-5)
        close(seen[f"{stream}_features"][-1], arrays[f"eval/{stream}_map"], 1e-5)
    close(seen["face"], arrays["eval/v_f"], 1e-5)
    close(seen["context"], arrays["eval/v_c"], 1e-5)
    close(seen["attention_scores"], arrays["eval/attention_scores"], 1e-5)
    close(seen["attention"].reshape(len(logits), -1), arrays["eval/attention"], 2e-7)
    close(seen["fusion_scores"], arrays["eval/fusion_scores"], 2e-6)
    close(seen["fusion_weights"], arrays["eval/fusion_weights"], 1e-6)
    close(seen["hidden"], arrays["eval/hidden"], 1e-5)
    close(logits, arrays["eval/logits"], 2e-6)
    close(jax.nn.softmax(logits), arrays["eval/probabilities"], 1e-6)
    black = np.zeros_like(arrays["faces_u8"])
    logits, _ = case.forward(arrays["contexts_u8"], black)
    close(jax.nn.softmax(logits), arrays["eval_black_face/probabilities"], 1e-6)


@pytest.mark.parametrize("attention", ["none", "caer"])
def test_golden_glamor_net_with_another_attention(golden_file, attention):
    arrays, variants = golden_file("glamor_original"), golden_file("glamor_variants")
    original = glamor_case(arrays)
    config = {"attention": attention, "widths": original.network.config.widths}
    values = original.params | original.norm_stats
    network = Network(
        network_config(original.config["model"] | config, original.classes),
    )
    shapes = network.param_shapes | network.norm_stats_shapes
    leaves = {"kernel": "kernel", "bias": "bias", "scale": "gamma"}
    for path in (path for path in shapes if path.startswith("attention/")):
        _, kind, i, leaf = path.split("/")
        of_norm = {"bias": "beta", "mean": "moving_mean", "var": "moving_variance"} | leaves
        name = leaves[leaf] if kind == "convs" else {**of_norm, "bias": "beta"}[leaf]
        part = "conv" if kind == "convs" else "bn"
        full = f"caer_attention/{i}/{part}/{name}"
        values[path] = jnp.asarray(recipe(full, shapes[path], int(arrays["weight_seed"])))
    original.network = network
    original.params = {path: values[path] for path in network.param_shapes}
    original.norm_stats = {path: values[path] for path in network.norm_stats_shapes}
    logits, seen = original.forward(arrays["contexts_u8"], arrays["faces_u8"])
    stored = {name: variants[f"attention_{attention}/{name}"] for name in ("attention", "v_c")}
    close(seen["attention"].reshape(len(logits), -1), stored["attention"], 1e-6)
    close(seen["context"], stored["v_c"], 1e-5)
    close(logits, variants[f"attention_{attention}/logits"], 1e-5)


def test_golden_glamor_net_resnet18(golden_file):
    variants = golden_file("glamor_variants")
    state = weights_of(variants, "resnet18/names", "resnet18/shapes")
    case = Case(variants, state, config="glamor_net_r18", hidden_dim=state["final_fc1.bias"].size)
    assert sum(x.size for x in case.params.values()) == variants["resnet18/num_params"]
    logits, seen = case.forward(variants["resnet18/contexts_u8"], variants["resnet18/faces_u8"])
    stored = {name: variants[f"resnet18/eval/{name}"] for name in ("v_f", "v_c", "attention")}
    close_map(seen["face"], stored["v_f"])
    close_map(seen["context"], stored["v_c"])
    close(seen["attention"].reshape(len(logits), -1), stored["attention"], 1e-6)
    close(seen["fusion_weights"], variants["resnet18/eval/fusion_weights"], 1e-5)
    close(logits, variants["resnet18/eval/logits"], 1e-5)


def test_golden_caer_net_s(golden_file):
    case = caer_case(arrays := golden_file("caer_net_s"))
    assert sum(x.size for x in case.params.values()) == arrays["num_params"]
    logits, seen = case.forward(arrays["contexts_u8"], arrays["faces_u8"])
    for stream in ("face", "context"):
        stored = arrays[f"eval/{stream}_map"].transpose(0, 2, 3, 1)
        close_map(seen[f"{stream}_features"][-1], stored)
    scores, attention = (arrays[f"eval/attention{x}"][:, 0] for x in ("_scores", ""))
    close(seen["attention_scores"].reshape(scores.shape), scores, 1e-5)
    close(seen["attention"], attention, 1e-6)
    names = {"face": "v_f", "context": "v_c_mean", "face_vector": "v_f_bn"}
    for ours, theirs in (names | {"context_vector": "v_c_bn", "hidden": "hidden"}).items():
        close(seen[ours], arrays[f"eval/{theirs}"], 1e-5)
    close(seen["fusion_scores"], arrays["eval/fusion_scores"], 1e-6)
    close(seen["fusion_weights"], arrays["eval/fusion_weights"], 1e-6)
    close(logits, arrays["eval/logits"], 1e-6)


@pytest.mark.parametrize("fusion", ["face_only", "context_only", "concat"])
def test_golden_caer_net_s_switches(golden_file, fusion):
    arrays = golden_file("caer_net_s")
    case = caer_case(arrays)
    if fusion == "concat":
        state = {n: x for n, x in case.state.items() if not n.startswith(SCORES)}
        case = Case(arrays, state, config="caer_net_s", fusion=fusion)
    else:
        case = caer_case(arrays, fusion=fusion)
    logits, _ = case.forward(arrays["contexts_u8"], arrays["faces_u8"])
    close(logits, arrays[f"eval_{fusion}/logits"], 1e-6)


SCORES = tuple(f"fusion_net.{stream}_{i}." for stream in ("face", "context") for i in (1, 2))


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("emo_net_resnet18", 1e-5), pytest.param("emo_net_resnet50", 2e-6, marks=pytest.mark.slow)],
)
def test_golden_emo_net(golden_file, name, tolerance):
    case = emo_case(arrays := golden_file(name), name)
    assert sum(x.size for x in case.params.values()) == arrays["num_params"]
    logits, seen = case.forward(arrays["contexts_u8"], arrays["bodies_u8"])
    close(seen["context"], arrays["eval/v_context"], 1e-5)
    close(seen["face"], arrays["eval/v_body"], 1e-5)
    close(seen["hidden"], arrays["eval/hidden"], 1e-5)
    for ours, theirs in (("context", "context"), ("face", "body")):
        last = seen[f"{ours}_features"][-1]
        close(last.mean(-1), arrays[f"eval/{theirs}_c5_channel_mean"], 1e-5)
    first = arrays["eval/context_c5_first_channels"].transpose(0, 2, 3, 1)
    close_map(seen["context_features"][-1][..., : first.shape[-1]], first)
    close(logits, arrays["eval/logits_cat"], tolerance)
    close(seen["ratings"], arrays["eval/vad"], tolerance)


@pytest.mark.parametrize("name", ["caer_net_s", "glamor_original", "emo_net_resnet18"])
def test_golden_names_are_recognized_and_written_again(golden_file, name):
    arrays = golden_file(name)
    cases = {"caer_net_s": caer_case, "glamor_original": glamor_case}
    case = cases[name](arrays) if name in cases else emo_case(arrays, name)
    assert detect_layout(case.state, case.layout) is case.layout
    again = to_torch(case.params | case.norm_stats, layout=case.layout)
    assert {n: x.tobytes() for n, x in again.items()} == {
        n: np.ascontiguousarray(x).tobytes() for n, x in case.state.items()
    }
