"""Configurations: each default, meaning and check stands once; files, presets and flags."""

import dataclasses
import json
import math
import typing
from pathlib import Path

import pytest

import dsct_jax
from configs import base
from data.command import override
from data.config import DataConfig
from dsct_jax import config as configuration
from dsct_jax.config import (
    dataclass_from_dict,
    defaults,
    presets,
    read_config,
    setting,
    to_builtins,
)
from dsct_jax.errors import UserError
from dsct_jax.model.build import NETWORKS, network_config
from dsct_jax.training.config import (
    LossConfig,
    MatcherConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
)
from tests.inference.test_load import small_config
from tests.weights.test_tensor_files import write_state

ROOT = Path(__file__).parents[1]
DSCT = NETWORKS["dsct"].config
SECTIONS = {
    "model": DSCT,
    "matcher": MatcherConfig,
    "loss": LossConfig,
    "optimizer": OptimizerConfig,
    "data": DataConfig,
    "train": TrainConfig,
}
SHARED = {
    "model": {"num_classes": 26},
    "data": {"class_names": base.EMOTIC_CLASSES, "multi_label": True},
}


def section(name: str, **changes):
    return SECTIONS[name](**SHARED.get(name, {}), **changes)


@pytest.mark.parametrize("name", SECTIONS)
def test_the_base_configuration_is_the_defaults(name):
    config = read_config(ROOT / "configs" / "base.py")
    assert config[name] == defaults(SECTIONS[name]) == to_builtins(section(name))
    assert dataclass_from_dict(SECTIONS[name], name, config[name], **SHARED.get(name, {}))


@pytest.mark.parametrize("kind", [*SECTIONS.values(), StepConfig])
def test_every_field_says_what_it_means_and_every_number_is_checked(kind):
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        assert kind is StepConfig or field.metadata["doc"], field.name
        numbers = {int, float} & {hints[field.name], *typing.get_args(hints[field.name])}
        texts = str in typing.get_args(
            hints[field.name]
        )  # an annotation file, or a number of scenes
        bounded = any(bound is not None for bound in field.metadata["bounds"].values())
        assert bounded or not numbers or texts, field.name


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("matcher", {"cost_class": -1.0}, "cost_class=-1.0 .* at least 0"),
        ("matcher", {"cost_giou": math.nan}, "cost_giou=nan .* at least 0"),
        ("matcher", {"implementation": "cpu"}, "implementation='cpu' .* one of scipy, device"),
        ("loss", {"weight_bbox": -1.0}, "weight_bbox=-1.0 .* at least 0"),
        ("loss", {"weight_class": math.inf}, "weight_class=inf .* at least 0 and finite"),
        ("loss", {"focal_alpha": 1.5}, "focal_alpha=1.5 .* at least 0 and at most 1"),
        ("loss", {"class_weights": (1.0, -1.0)}, r"class_weights=\(1.0, -1.0\) .* at least 0"),
        ("loss", {"label_smoothing": 1.0}, "label_smoothing=1.0 .* less than 1"),
        ("optimizer", {"learning_rate": 0.0}, "learning_rate=0.0 .* more than 0"),
        ("optimizer", {"learning_rate": math.inf}, "learning_rate=inf .* more than 0 and finite"),
        ("optimizer", {"clip_norm": math.nan}, "clip_norm=nan .* more than 0"),
        ("optimizer", {"drop_at": 2.0}, "drop_at=2.0 .* at most 1"),
        ("optimizer", {"warmup_steps": -1}, "warmup_steps=-1 .* at least 0"),
        ("optimizer", {"schedule": "poly"}, "schedule='poly' .* one of step, cosine"),
        ("train", {"batch_size": 0}, "batch_size=0 .* at least 1"),
        ("train", {"epochs": 0.0}, "epochs=0.0 .* more than 0"),
        ("train", {"eval_every": math.inf}, "eval_every=inf .* more than 0 and finite"),
        ("train", {"ema_decay": 1.0}, "ema_decay=1.0 .* at least 0 and less than 1"),
        ("train", {"max_skipped": -1}, "max_skipped=-1 .* at least 0"),
        ("data", {"buckets": ()}, "buckets=.* at least one"),
        ("data", {"buckets": ((0, 8),)}, "buckets=.* at least 1"),
        ("data", {"crop_size": (9, 8)}, r"crop_size=\(9, 8\) .* \(smallest, largest\)"),
        ("data", {"flip_probability": 1.5}, "flip_probability=1.5 .* at most 1"),
        ("data", {"num_workers": -1}, "num_workers=-1 .* at least 0"),
        ("data", {"source": "ncaer_s"}, "source='ncaer_s' requires config.multi_label=False"),
    ],
)
def test_what_cannot_be_used_is_one_line(name, changes, message):
    with pytest.raises(UserError, match=f"^config.{name}.{message}"):
        section(name, **changes)


def test_an_infinite_clip_norm_does_not_clip():
    assert section("optimizer", clip_norm=math.inf).clip_norm == math.inf


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("model.num_heads=4", 4),
        ("model.name=dsct", "dsct"),
        ("model.dropout=0", 0.0),
        ("model.fusion_layers=(1,2)", (1, 2)),
        ("optimizer.clip_norm=inf", math.inf),
        ("train.epochs=0.5", 0.5),
        ("data.buckets=((64,64),)", ((64, 64),)),
        ("data.cache=True", True),
    ],
)
def test_a_flag_changes_a_field_and_keeps_its_type(flag, expected):
    config = override(read_config(ROOT / "configs" / "base.py"), [f"--config.{flag}"])
    name, field = flag.split("=")[0].split(".")
    kind = dataclass_from_dict(SECTIONS[name], name, config[name], **SHARED.get(name, {}))
    assert getattr(kind, field) == expected and type(getattr(kind, field)) is type(expected)


def test_presets_are_the_configurations_of_the_released_weights():
    """After a change: json.dumps of read_config(configs/NAME.py), one line per section."""
    files = {path.stem: path for path in (ROOT / "configs").glob("*_released.py")}
    assert set(presets()) == files.keys()
    for name, path in files.items():
        assert read_config(name) == read_config(path)
        shipped = json.loads((ROOT / "dsct_jax" / "presets" / f"{name}.json").read_text())
        assert network_config(shipped["model"], len(shipped["class_names"]))


def test_a_file_wins_over_a_preset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config("emotic_r50_released")["name"] == "emotic_r50_released"
    with pytest.raises(
        UserError, match="x: no such file; the presets are caer_s_r50_released, emo"
    ):
        read_config("x")
    Path("emotic_r50_released").mkdir()
    with pytest.raises(UserError, match="--config=emotic_r50_released: no such file"):
        read_config(Path("emotic_r50_released"))
    Path("mine.json").write_text('{"name": "mine", "sizes": [1, 2]}')
    assert read_config("mine.json") == {"name": "mine", "sizes": (1, 2)}
    assert read_config({"sizes": [1, 2]}) == {"sizes": (1, 2)}


def test_a_released_file_is_loaded_by_the_name_of_a_preset(tmp_path, monkeypatch, golden):
    state = {
        name.removeprefix("state/"): array
        for name, array in golden("model_small").items()
        if name.startswith("state/")
    }
    write_state(tmp_path / "released.pth", state)
    (tmp_path / "small.json").write_text(json.dumps(small_config()))
    monkeypatch.setattr(configuration, "PRESETS", tmp_path)
    monkeypatch.chdir(tmp_path)
    model = dsct_jax.load("released.pth", config="small")
    assert model.config == small_config() and len(model.class_names) == 26


def test_a_section_goes_to_builtins_and_back():
    @dataclasses.dataclass(frozen=True)
    class Run:
        seed: int = setting(3, low=0)
        loss: LossConfig = dataclasses.field(
            default_factory=lambda: LossConfig(class_weights=(1.0, 2.0))
        )

    plain = to_builtins(Run())
    assert plain["seed"] == 3 and plain["loss"]["class_weights"] == (1.0, 2.0)
    assert dataclass_from_dict(LossConfig, "loss", plain["loss"]) == Run().loss
