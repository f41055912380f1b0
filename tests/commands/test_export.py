"""Exports: the golden model through every format, in processes that know nothing of ours, and the
same bytes twice.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

import dsct_jax
from configs import base, debug, emotic_r50
from dsct_jax import __main__
from dsct_jax.commands.export import _noise, export
from dsct_jax.commands.onnx_export import onnx_session, write_onnx
from dsct_jax.commands.parsers import parse_sizes
from dsct_jax.config import to_builtins
from dsct_jax.errors import UserError
from dsct_jax.evaluation.calibration import save_fit
from dsct_jax.inference.load import Model, model_config
from dsct_jax.model.build import NETWORKS, Network, network_config
from dsct_jax.parallel import make_mesh
from dsct_jax.training.checkpoint import Checkpoints
from dsct_jax.training.step import TrainState
from dsct_jax.weights.run_directory import load_weights
from dsct_jax.weights.tensor_files import read_pth
from tests.inference.test_load import small_config
from tests.model.test_deformable_runs import SMALL
from tests.weights.test_tensor_files import write_state


def main(arguments):
    """`python -m dsct_jax export` in this process."""
    return __main__.main(["export", *arguments])


ROOT = Path(__file__).parents[2]
SIZE = (90, 97)  # of the golden batch
# of two flags, the last counts
ONE_FLAG = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
ONE_DEVICE = os.environ | {"XLA_FLAGS": ONE_FLAG}

# Runs an artifact in a process where Flax and this package cannot be imported; the arrays come and
# go as files.
ALONE = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        ours = ("flax", "optax", "orbax", "dsct_jax", "pallas_kernels", "safetensors")
        if name.split(".")[0] in ours:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import jax, jax.export, numpy as np
folder, images, mask, out = sys.argv[1:]
about = json.load(open(folder + "/model.json"))
weights = dict(np.load(folder + "/" + about["weights"]))
images, mask = np.load(images), np.load(mask)
artifact = about["artifacts"]["x".join(map(str, images.shape[1:3]))]
call = jax.jit(jax.export.deserialize(bytearray(open(folder + "/" + artifact, "rb").read())).call)
for batch in (1, 7):
    inputs = (np.resize(array, (batch, *array.shape[1:])) for array in (images, mask))
    answer = call(weights, *inputs)
    np.savez(out + str(batch), **answer)
"""


@pytest.fixture(scope="module")
def state(golden):
    arrays = golden("model_small")
    return {
        name.removeprefix("state/"): arrays[name] for name in arrays if name.startswith("state/")
    }


@pytest.fixture(scope="module")
def model(state, tmp_path_factory):
    model = dsct_jax.load(
        write_state(tmp_path_factory.mktemp("pth") / "x.pth", state), small_config()
    )
    fit = {"temperature": 1.5, "thresholds": (0.25,) * 26, "fitted_on": "val", "people": 100}
    model.decoder = dataclasses.replace(model.decoder, **fit)
    return model


@pytest.fixture(scope="module")
def stablehlo(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stablehlo")
    return folder, export(model, folder, format="stablehlo", sizes=[SIZE])


def golden_batch(golden):
    arrays = golden("model_small")
    return (
        arrays["batch"].transpose(0, 2, 3, 1),
        arrays["mask"],
        arrays["pred_logits"],
        arrays["pred_boxes"],
    )


def assert_golden(logits, boxes, golden) -> None:
    _, _, expected_logits, expected_boxes = golden_batch(golden)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(boxes, expected_boxes, rtol=0, atol=1e-5)


def test_stablehlo_alone_at_batch_1_and_7(stablehlo, golden, tmp_path):
    folder, report = stablehlo
    assert "largest difference to the checkpoint: logits" in report[0]
    assert "ms, live" in report[0]
    images, mask, logits, boxes = golden_batch(golden)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "mask.npy", mask)
    arguments = [
        str(folder),
        str(tmp_path / "images.npy"),
        str(tmp_path / "mask.npy"),
        str(tmp_path / "out"),
    ]
    subprocess.run(
        [sys.executable, "-c", ALONE, *arguments], cwd=tmp_path, env=ONE_DEVICE, check=True
    )
    for batch in (1, 7):
        answer = np.load(tmp_path / f"out{batch}.npz")
        np.testing.assert_allclose(
            answer["logits"], np.resize(logits, (batch, *logits.shape[1:])), rtol=0, atol=1e-5
        )
        np.testing.assert_allclose(
            answer["boxes"], np.resize(boxes, (batch, *boxes.shape[1:])), rtol=0, atol=1e-5
        )


def test_what_is_recorded(stablehlo, model):
    about = json.loads((stablehlo[0] / "model.json").read_text())
    assert about["class_names"] == list(model.class_names)
    assert about["decoder"]["thresholds"] == [0.25] * 26
    assert about["preprocessing"]["short_side"] == 800
    assert about["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert about["subject_logit"] is True
    artifact = jax.export.deserialize(
        bytearray((stablehlo[0] / "model_90x97.stablehlo").read_bytes())
    )
    assert artifact.platforms == ("cpu", "cuda", "tpu")
    assert jax.config.jax_traceback_in_locations_limit != 0  # put back


def test_the_same_bytes_whatever_the_process(stablehlo, model, tmp_path):
    model.save(tmp_path / "m.safetensors")
    program = (
        "import sys, pathlib, dsct_jax; from dsct_jax.commands.export import write_stablehlo\n"
        "write_stablehlo(dsct_jax.load(sys.argv[1]), pathlib.Path(sys.argv[2]), [(90, 97)], {})"
    )
    (tmp_path / "again").mkdir()
    arguments = [str(tmp_path / "m.safetensors"), str(tmp_path / "again")]
    subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={**ONE_DEVICE, "PYTHONHASHSEED": "5"},
        check=True,
    )
    for name in ("model_90x97.stablehlo", "weights.npz"):
        assert (tmp_path / "again" / name).read_bytes() == (stablehlo[0] / name).read_bytes(), name
    assert str(ROOT).encode() not in (tmp_path / "again" / "model_90x97.stablehlo").read_bytes()
    for format, name in (("safetensors", "model.safetensors"), ("torch", "model.pth")):
        files = [tmp_path / folder / name for folder in ("a", "b")]
        for file in files:
            export(model, file.parent, format=format)
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_example_runs_alone(stablehlo, model, tmp_path):
    height, width = SIZE
    image = np.random.default_rng(0).integers(0, 256, (height, 80, 3), np.uint8)
    np.save(tmp_path / "photo.npy", image)
    (tmp_path / "sitecustomize.py").write_text(
        ALONE.split("import jax")[0]
    )  # blocks Flax and this package
    environment = {**ONE_DEVICE, "PYTHONPATH": str(tmp_path)}
    command = [
        sys.executable,
        str(ROOT / "examples" / "run_exported.py"),
        str(stablehlo[0]),
        "photo.npy",
    ]
    said = subprocess.run(
        command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout
    from dsct_jax.preprocess import normalize

    mask = np.zeros((2, height, width), bool)  # a batch of two, as compiled before
    mask[:, :, 80:] = True
    canvas = np.pad(image, ((0, 0), (0, width - 80), (0, 0)))
    images = normalize(jax.numpy.asarray(np.stack([canvas] * 2)), jax.numpy.asarray(mask))
    out = model(images, mask)
    query = np.asarray(out.logits[-1, 0, :, -1]).argmax()
    assert model.class_names[np.asarray(out.logits[-1, 0, query, :-1]).argmax()] in said
    shown = [
        float(number) for number in said.split("(cx, cy, w, h) = [")[1].split("]")[0].split(",")
    ]
    np.testing.assert_allclose(shown, out.boxes[-1, 0, query], rtol=0, atol=1e-4)


def test_safetensors(model, golden, tmp_path):
    from safetensors import safe_open

    assert (
        "largest difference to the checkpoint: 0 in"
        in export(model, tmp_path, format="safetensors")[0]
    )
    with safe_open(str(tmp_path / "model.safetensors"), framework="numpy") as file:
        assert json.loads(file.metadata()["class_names"]) == list(model.class_names)
        assert json.loads(file.metadata()["config"])["model"]["hidden_dim"] == 64
    images, mask, *_ = golden_batch(golden)
    out = dsct_jax.load(tmp_path / "model.safetensors")(images, mask)
    assert_golden(out.logits[-1], out.boxes[-1], golden)


def test_ours_to_the_released_layout_and_back_is_bit_identical(model, state, golden, tmp_path):
    assert (
        "largest difference to the checkpoint: 0 in" in export(model, tmp_path, format="torch")[0]
    )
    written, texts = read_pth(tmp_path / "model.pth")
    heads = {
        name.replace(".0.", ".1.", 1): value
        for name, value in state.items()
        if "embed_dsct" in name and ".0." in name
    }
    assert written.keys() == (state | heads).keys()  # what the authors' code lists
    for name, value in (state | heads).items():
        np.testing.assert_array_equal(
            written[name].view(np.uint32), value.view(np.uint32), err_msg=name
        )
        assert written[name].shape == value.shape
    assert json.loads(texts["class_names"]) == list(model.class_names)
    back = dsct_jax.load(tmp_path / "model.pth")  # with the configuration written in it
    for ours, theirs in ((back.params, model.params), (back.norm_stats, model.norm_stats)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_array_equal(
                np.asarray(ours[name]).view(np.uint32),
                np.asarray(value).view(np.uint32),
                err_msg=name,
            )
    images, mask, *_ = golden_batch(golden)
    out = back(images, mask)
    assert_golden(out.logits[-1], out.boxes[-1], golden)


@pytest.mark.torch
def test_torch_loads_what_was_written(model, state, tmp_path):
    import torch

    export(model, tmp_path, format="torch")
    for weights_only in (True, False):
        content = torch.load(tmp_path / "model.pth", weights_only=weights_only)
        for name, value in state.items():
            np.testing.assert_array_equal(content["model"][name].numpy(), value)
    shared = content["model"]
    assert (
        shared["class_embed_dsct.0.weight"].data_ptr()
        == shared["class_embed_dsct.1.weight"].data_ptr()
    )
    module = torch.nn.Linear(64, 27)  # as the authors' code does with the whole model
    prefix = "class_embed_dsct.0."
    module.load_state_dict(
        {
            name.removeprefix(prefix): value
            for name, value in shared.items()
            if name.startswith(prefix)
        }
    )
    assert (tmp_path / "model.pth").read_bytes().startswith(b"PK")


def test_what_the_authors_code_has_not_is_refused(tmp_path):
    for change, says in (
        ({"norm": "group"}, "frozen_batch only"),
        ({"reweighting": "attentive"}, "context_logits"),
        ({"box_refinement": True}, "refinement"),
    ):
        config = small_config(**change)
        functions = Network(model_config(config))
        other = Model(functions, *functions.init(0), config)
        with pytest.raises(UserError, match=says):
            export(other, tmp_path, format="torch")
    assert list(tmp_path.iterdir()) == []


def test_the_paper_variant_is_written_with_a_note(model, tmp_path):
    config = small_config(fusion="paper", semantic_selection="smallest")
    other = Model(Network(model_config(config)), model.params, model.norm_stats, config)
    assert (
        "the authors' code loads it, but computes fusion=released"
        in export(other, tmp_path, format="torch")[0]
    )


def test_what_differs_from_the_checkpoint_is_not_kept(model, tmp_path, monkeypatch):
    from dsct_jax.weights.tensor_files import write_npz, write_pth

    def spoilt(arrays, name):
        return {**arrays, name: arrays[name] + np.float32(0.01)}

    monkeypatch.setattr(
        "dsct_jax.commands.export.write_npz",
        lambda path, arrays: write_npz(path, spoilt(arrays, "params/class_head/bias")),
    )
    with pytest.raises(UserError, match=r"differs from the checkpoint by 0\.01"):
        export(model, tmp_path, format="stablehlo", sizes=[SIZE])
    monkeypatch.setattr(
        "dsct_jax.commands.export.write_pth",
        lambda path, arrays, notes: write_pth(path, spoilt(arrays, "query_embed.weight"), notes),
    )
    with pytest.raises(
        UserError, match=r"differs from the checkpoint by 0\.01 \(params/context_queries\)"
    ):
        export(model, tmp_path, format="torch")
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_eight_devices_on_a_machine_with_one(model, tmp_path, golden):
    assert len(jax.devices()) == 8
    mesh = make_mesh()
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = {
        name: jax.device_put(
            value, spread if value.ndim and value.shape[0] % 8 == 0 else replicated
        )
        for name, value in model.params.items()
    }
    assert any(
        len({str(shard.index) for shard in value.addressable_shards}) == 8
        for value in params.values()
    )  # really in eight parts
    frozen_params = {
        name: value for name, value in params.items() if name.startswith("backbone/stem")
    }
    trained = {name: value for name, value in params.items() if name not in frozen_params}
    average = {name: value + 1 for name, value in trained.items()}
    state = TrainState(
        jax.numpy.int32(3),
        trained,
        frozen_params,
        jax.device_put(model.norm_stats, replicated),
        {},
        average,
    )
    state = jax.tree.map(
        lambda x: x if isinstance(x, jax.Array) else jax.device_put(x, replicated), state
    )
    checkpoints = Checkpoints(tmp_path / "run", metadata={"config": model.config})
    checkpoints.save(state)
    checkpoints.close()
    decoder = dataclasses.replace(model.decoder, temperature=2.0)
    save_fit(decoder, tmp_path / "run" / "thresholds.json", checkpoint="step 3")
    arguments = [
        f"--checkpoint={tmp_path / 'run'}",
        f"--output={tmp_path / 'out'}",
        "--format=safetensors",
    ]
    program = (
        "import jax, sys; assert len(jax.devices()) == 1; from dsct_jax.__main__ import main; "
        "sys.exit(main(['export', *sys.argv[1:]]))"
    )
    subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, env=ONE_DEVICE, check=True
    )
    exported = dsct_jax.load(tmp_path / "out" / "model.safetensors")
    for name, value in model.params.items():  # the moving average, where there is one
        np.testing.assert_array_equal(
            exported.params[name], value if name in frozen_params else average[name], err_msg=name
        )
    last = load_weights(tmp_path / "run", ema=False).params
    np.testing.assert_array_equal(last["class_head/bias"], model.params["class_head/bias"])
    assert exported.decoder.temperature == 2.0


def test_onnx(model, golden, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
    report = export(model, tmp_path, format="onnx", sizes=[SIZE])
    assert "largest difference to the checkpoint" in report[0]
    path = tmp_path / "model_90x97.onnx"
    images, mask, *_ = golden_batch(golden)
    run = onnx_session(path)
    assert_golden(*run(images, mask), golden)
    alone = [run(images[i : i + 1], mask[i : i + 1])[0][0] for i in range(len(images))]
    np.testing.assert_allclose(alone, run(images, mask)[0], atol=1e-5)
    graph = onnx.load(str(path))
    texts = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(texts["class_names"]) == list(model.class_names)
    kinds = Counter(node.op_type for node in graph.graph.node)
    config = model.config["model"]
    layers = config["num_encoder_layers"] + config["num_decoder_layers"]
    assert kinds["GridSample"] == layers * config["num_levels"]


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"dsct", "deta"}))
def test_onnx_of_every_network(name, tmp_path):
    """A batch of one and of three."""
    pytest.importorskip("onnx", reason="the onnx extra is not installed")
    config = debug.get_config()
    base.use_network(config, name)
    config.model.update({key: value for key, value in SMALL.items() if key in config.model})
    network = Network(network_config(config.model.to_dict(), 4))
    model = dsct_jax.Model(network, *network.init(0), config.to_dict())
    size = model.crops.canvases[0] if model.crops else (64, 80)
    write_onnx(model, tmp_path / "m.onnx", size, notes={})
    run = onnx_session(tmp_path / "m.onnx")
    for batch in (1, 3):
        inputs = _noise(model, size, batch)
        expected = model(*inputs)
        logits, boxes = run(*inputs)
        np.testing.assert_allclose(logits, expected.logits[-1], atol=1e-5)
        np.testing.assert_allclose(boxes, expected.boxes[-1], atol=1e-5)


def test_what_onnx_cannot_say_is_named(tmp_path):
    pytest.importorskip("onnx", reason="the onnx extra is not installed")
    config = debug.get_config()
    base.use_network(config, "deta")
    config.model.update(SMALL)
    network = Network(network_config(config.model.to_dict(), 4))
    model = dsct_jax.Model(network, *network.init(0), config.to_dict())
    with pytest.raises(UserError, match="uses while, which has no translation"):
        write_onnx(model, tmp_path / "m.onnx", (64, 80), notes={})


def test_mistakes_are_one_line(model, tmp_path, capsys):
    model.save(tmp_path / "m.safetensors")
    checkpoint, output = (
        f"--checkpoint={tmp_path / 'm.safetensors'}",
        f"--output={tmp_path / 'out'}",
    )
    for arguments, says in (
        ([f"--checkpoint={tmp_path / 'x'}", output, "--format=torch"], "no such file"),
        ([checkpoint, output, "--format=tflite"], "must be one of stablehlo"),
        ([checkpoint, output, "--format=stablehlo", "--sizes=800"], "HEIGHTxWIDTH"),
    ):
        assert main(arguments) == 2
        line = capsys.readouterr().err
        assert says in line
        assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main([checkpoint, f"--output={tmp_path / 'm.safetensors'}", "--format=torch"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert parse_sizes("96x136,136x96") == ((96, 136), (136, 96))


@pytest.mark.slow
def test_onnx_of_the_full_model(tmp_path):
    """R50 at 480x640: written in three minutes, below 200 MB, within 1e-5 at two batch sizes."""
    pytest.importorskip("onnx", reason="the onnx extra is not installed")
    config = to_builtins(emotic_r50.get_config())
    network = Network(model_config(config))
    model = Model(network, *network.init(0), config)
    start, path = time.monotonic(), tmp_path / "m.onnx"
    write_onnx(model, path, (480, 640), notes={})
    assert time.monotonic() - start < 180
    assert path.stat().st_size < 200e6
    run = onnx_session(path)
    for b in (1, 3):
        images = np.random.default_rng(b).standard_normal((b, 480, 640, 3), np.float32)
        mask = np.zeros((b, 480, 640), bool)
        mask[:, :, 600:] = True
        expected = model(images, mask)
        for found, ours in zip(run(images, mask), (expected.logits, expected.boxes), strict=True):
            np.testing.assert_allclose(found, ours[-1], rtol=0, atol=1e-5)
