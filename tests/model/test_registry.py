"""A network is one file and one line of the registry: a toy trains, evaluates, predicts and is
exported like the product's own.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dsct_jax
import train
from dsct_jax.__main__ import main
from dsct_jax.batch import Predictions
from dsct_jax.config import check_settings, defaults, free_fields, setting, to_builtins
from dsct_jax.errors import UserError
from dsct_jax.model.backbone import BACKBONES, ResNet
from dsct_jax.model.build import NETWORKS, Entry, Network, network_config
from dsct_jax.model.layers import Linear

CONFIGURATION = """
from ml_collections import ConfigDict
from configs import debug

def get_config():
    config = debug.get_config()
    config.model = ConfigDict({"name": "readout", "backbone": "tiny"})
    config.train.update(batch_size=8, eval_batch_size=8, epochs=1)
    config.data.update(train="8", val="8", test="8")
    return config
"""


@dataclasses.dataclass(frozen=True)
class ReadoutConfig:
    num_classes: int = setting(shared=True, low=1)
    name: str = setting("readout")
    backbone: str = setting("resnet18", choices=BACKBONES)

    def __post_init__(self) -> None:
        check_settings(self, "model")


class Readout(nnx.Module):
    """The mean of C5, linearly: one fixed query per image."""

    def __init__(self, config: ReadoutConfig, *, rngs: nnx.Rngs):
        resnet = BACKBONES[config.backbone]
        self.backbone = ResNet(resnet, norm="group", rngs=rngs)
        self.head = Linear(resnet.channels[-1], config.num_classes + 1 + 4, rngs=rngs)

    def __call__(self, images, padding_mask, *, noise=None, return_details=False, **_):
        answer = self.head(self.backbone(images)[-1].mean((1, 2)))[None, :, None]
        return Predictions(answer[..., :-4], jax.nn.sigmoid(answer[..., -4:]))


@pytest.fixture(scope="module")
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "readout", Entry(ReadoutConfig, Readout, "set_prediction"))
        yield


@pytest.fixture(scope="module")
def workdir(registered, tmp_path_factory):
    folder = tmp_path_factory.mktemp("readout")
    (folder / "readout.py").write_text(CONFIGURATION)
    arguments = [f"--config={folder / 'readout.py'}", f"--workdir={folder / 'run'}"]
    assert train.main(arguments) == 0
    assert train.main([*arguments, "--mode=eval", "--split=test"]) == 0
    return folder / "run"


def test_a_run_trains_and_evaluates(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert any(np.isfinite(line.get("train/total", line.get("total", np.nan))) for line in lines)
    assert json.loads((workdir / "metrics_test.json").read_text())["num_images"] == 8
    assert json.loads((workdir / "config.json").read_text())["model"]["name"] == "readout"


def test_it_predicts(workdir):
    model = dsct_jax.load(workdir)
    assert model.config["model"] == {"name": "readout", "backbone": "tiny"}
    (people,) = dsct_jax.predict(model, [Image.new("RGB", (80, 60))], min_confidence=0.0)
    assert len(people) == 1


@pytest.mark.parametrize("form", ["stablehlo", "safetensors"])
def test_it_is_exported(workdir, tmp_path, form, capsys):
    size = [] if form == "safetensors" else ["--sizes=64x64"]
    arguments = [f"--checkpoint={workdir}", f"--output={tmp_path / 'out'}", f"--format={form}"]
    assert main(["export", *arguments, *size]) == 0
    assert "written" in capsys.readouterr().out


def test_the_values_of_a_network_belong_to_its_name(registered):
    network = Network(network_config({"name": "readout", "backbone": "tiny"}, 7))
    params, norm_stats = network.init(3)
    assert {path: value.shape for path, value in params.items()} == network.param_shapes
    assert norm_stats == network.norm_stats_shapes == {}
    bound = network.bind(params, norm_stats)
    assert isinstance(bound, Readout)
    answer = bound(jnp.ones((2, 64, 64, 3)), jnp.zeros((2, 64, 64), bool))
    assert answer.logits.shape == (1, 2, 1, 8) and answer.boxes.shape == (1, 2, 1, 4)


def test_unknown_names_and_fields_of_another_network(registered):
    with pytest.raises(UserError, match=r"config\.model\.name='reader' .* one of dsct, "):
        network_config({"name": "reader"}, 7)
    with pytest.raises(UserError, match=r"config\.model\.num_heads: unknown field"):
        network_config({"name": "readout", "num_heads": 8}, 7)


def test_a_section_without_a_name_is_from_before_the_registry():
    old = network_config({"hidden_dim": 64}, 7)
    assert to_builtins(old) == defaults(NETWORKS["dsct"].config) | {"hidden_dim": 64}
    assert set(free_fields(type(old))) == {
        *("compute_dtype", "remat", "dropout"),
        *("modality_weights", "modality_dtype"),
    }
