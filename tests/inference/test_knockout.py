"""The fusions that stand in for a model's own do what their names say, and the model's own gives
the model's own accuracy.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import knockout
from configs import debug, emotic_r50
from data.command import data_config
from data.pipeline import make_dataset
from data.readers.scenes import CUES
from dsct_jax.cli import run_command
from dsct_jax.config import to_builtins
from dsct_jax.inference.load import Model, model_config
from dsct_jax.model import decoder
from dsct_jax.model.build import Network
from dsct_jax.model.decoder import FusionConfig, subject_context_fusion

BOTH = FusionConfig(
    "paper", "smallest", num_spatial_neighbors=2, num_semantic_neighbors=3, reweighting="semantic"
)


@pytest.fixture
def tokens():
    """Two images: subject [b q d], context [b m d], and their points."""
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.random(shape), jnp.float32)
        for shape in ((2, 3, 8), (2, 6, 8), (2, 3, 2), (2, 6, 2))
    ]


def test_each_fusion_is_what_it_says(tokens):
    def fused(name):
        return np.asarray(knockout.FUSIONS[name](*tokens, config=BOTH, attentive_logits=None)[0])

    def own(arguments, spatial, semantic):
        return np.asarray(
            subject_context_fusion(
                *arguments, config=FusionConfig("paper", "smallest", spatial, semantic, "semantic")
            )[0]
        )

    subject, context, *points = tokens
    np.testing.assert_array_equal(fused("as trained"), own(tokens, 2, 3))
    np.testing.assert_array_equal(fused("selected by distance alone"), own(tokens, 2, 0))
    np.testing.assert_array_equal(fused("selected by relevance alone"), own(tokens, 0, 3))
    np.testing.assert_array_equal(
        fused("context of another image"), own([subject, context[::-1], *points], 2, 3)
    )
    np.testing.assert_array_equal(fused("nothing added"), subject)
    assert not np.allclose(fused("context of another image"), fused("as trained"))


def test_likeness_is_the_cosine_of_what_is_added(tokens):
    subject, _, *points = tokens
    fused, seen = knockout._with_likeness(
        subject, jnp.repeat(2 * subject[:, :1], 6, 1), *points, config=BOTH
    )
    np.testing.assert_allclose(
        seen["likeness"][:, 0], 1, rtol=1e-5
    )  # twice itself is added to the first query
    np.testing.assert_allclose(fused[:, 0], 3 * subject[:, 0], rtol=1e-5)
    a, b = np.asarray(subject[:, 1]), np.asarray(subject[:, 0])
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(seen["likeness"][:, 1], cosine, rtol=1e-5)


def test_the_models_own_fusion_gives_its_own_accuracy(tmp_path):
    config = to_builtins(debug.get_config()) | {"multi_label": False}
    config["data"]["test"] = "12"
    (tmp_path / "config.json").write_text(json.dumps(config))
    functions = Network(model_config(config))
    model = Model(functions, *functions.init(0), config)
    data = make_dataset(
        data_config(tmp_path / "config.json"), "test", batch_size=6, seed=0, training=False
    )
    calls = []

    def counted(*arguments, **options):
        calls.append(options["config"])
        return subject_context_fusion(*arguments, **options)

    cosines = knockout.likeness(model, data)
    assert len(cosines) == functions.config.num_decoder_layers
    assert all(-1 <= cosine <= 1 for cosine in cosines)
    own = knockout.knocked_out_accuracies(model, data, knockout.FUSIONS["as trained"])
    assert knockout.knocked_out_accuracies(model, data, counted) == own
    assert (
        len(calls) >= functions.config.num_decoder_layers
    )  # it stood in for the fusion of every layer
    assert decoder.subject_context_fusion is subject_context_fusion  # and left
    shares = [
        np.mean([cue == name for record in data.records for cue in record.cues]) for name in CUES
    ]
    np.testing.assert_allclose(own["all"], np.dot(shares, [own[cue] for cue in CUES]), rtol=1e-12)


def test_other_data_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(to_builtins(emotic_r50.get_config())))
    assert run_command(lambda: knockout.run([str(tmp_path)])) == 2
    assert "cues are known for config.data.source='scenes'" in capsys.readouterr().err


def test_the_table_is_in_percent():
    text = knockout.format_markdown(
        {"as trained": {"all": 0.5, "far": 0.25}, "nothing added": {"all": 1.0, "far": 0.0}},
        "runs/demo",
    )
    assert text.splitlines()[::2] == ["| runs/demo | all | far |", "| as trained | 50.0 | 25.0 |"]
    assert text.splitlines()[-1] == "| nothing added | 100.0 | 0.0 |"
