"""The model card: every number in it comes from the run's files, and what a run cannot know is
asked for.
"""

import json

import pytest

from dsct_jax import __main__
from dsct_jax.commands.model_card import model_card
from dsct_jax.errors import UserError
from tests.inference.test_load import small_config


def main(arguments):
    """`python -m dsct_jax model_card` in this process."""
    return __main__.main(["model_card", *arguments])


METRICS = {
    "protocol": "emotic_head_dsct",
    "num_images": 12,
    "num_people": 34,
    "num_labelled": 33,
    "mAP": 0.3726,
    "chance_mAP": 0.2186,
    "accuracy": 0.5,
    "mean_iou": 0.75,
    "intervals": {"mAP": [0.36, 0.385]},
    "resamples": 1000,
    "per_class": {"Anger": {"AP": 0.125, "people": 7}},
}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(small_config() | {"init_from": "r50_deformable_detr.pth"})
    )
    (tmp_path / "env.json").write_text(
        json.dumps({"versions": {"jax": "0.10.2"}, "commit": "abc123"})
    )
    (tmp_path / "metrics_test.json").write_text(json.dumps(METRICS))
    (tmp_path / "thresholds.json").write_text(
        json.dumps({"temperature": 1.25, "thresholds": [0.3] * 26, "split": "val"})
    )
    return tmp_path


def test_numbers_come_from_the_run(run):
    card = model_card(run)
    assert "| mAP (step-wise average precision) | 37.26 % | 36.00 to 38.50 | 21.86 % |" in card
    assert "| accuracy | 50.00 % |  |  |" in card
    assert "| Anger | 12.50 % |  | 7 |" in card
    assert "Protocol: **emotic_head_dsct**" in card
    assert "12 images, 34 people, 33 of them labeled" in card
    assert "Started from: r50_deformable_detr.pth" in card
    assert "commit abc123; jax 0.10.2" in card
    assert "1000 resamples" in card
    assert "Temperature 1.25, fitted on val" in card
    assert "| Yearning | 0.300 |" in card
    assert "**apparent** emotion" in card
    assert "Apache-2.0" in card


def test_without_intervals_and_thresholds_it_says_so(run):
    (run / "thresholds.json").unlink()
    (run / "metrics_test.json").write_text(
        json.dumps(
            {key: value for key, value in METRICS.items() if key not in ("intervals", "resamples")}
        )
    )
    card = model_card(run)
    assert "No intervals" in card
    assert "Nothing was fitted on validation: a class counts above 0.5." in card


def test_the_command(run, tmp_path, capsys):
    assert main([f"--workdir={run}"]) == 0
    assert "questions in it" in capsys.readouterr().out
    assert (run / "MODEL_CARD.md").read_text() == model_card(run)
    assert main([f"--workdir={run}", "--split=val"]) == 2
    assert "--split=val writes it" in capsys.readouterr().err
    assert main([f"--workdir={run}", f"--output={run / 'config.json' / 'card.md'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match=r"config\.json: missing"):
        model_card(tmp_path / "nowhere")
