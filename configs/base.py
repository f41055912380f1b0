"""A run's configuration with its sections' defaults, which are the paper's: EMOTIC, ResNet-50, 4
subject and 300 context queries. Another configuration is a difference from this one.

Fields, meanings, units and checks stand where the sections do: `model` in dsct_jax/model/dsct.py,
`data` in data/config.py, the others in dsct_jax/training/config.py (paper = "Two in One Go", ACM MM
2024; "released" = the authors' code).
"""

from typing import Any

from ml_collections import ConfigDict

from data.config import DataConfig
from dsct_jax.config import defaults
from dsct_jax.model.build import NETWORKS
from dsct_jax.model.dsct import DSCTConfig
from dsct_jax.training.config import LossConfig, MatcherConfig, OptimizerConfig, TrainConfig

EMOTIC_CLASSES = (
    "Affection", "Anger", "Annoyance", "Anticipation", "Aversion", "Confidence", "Disapproval",
    "Disconnection", "Disquietment", "Doubt/Confusion", "Embarrassment", "Engagement", "Esteem",
    "Excitement", "Fatigue", "Fear", "Happiness", "Pain", "Peace", "Pleasure", "Sadness",
    "Sensitivity", "Suffering", "Surprise", "Sympathy", "Yearning",
)  # fmt: skip
CAER_S_CLASSES = ("Anger", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise")


def get_config() -> ConfigDict:
    """The complete configuration with the paper's EMOTIC values."""
    return ConfigDict(
        {
            "name": "base",
            "seed": 0,
            "init_from": "",  # weights to start from: files of others or a run (docs/weights.md)
            "class_names": EMOTIC_CLASSES,
            "multi_label": True,  # any number of emotions per person; False: exactly one (CAER-S)
            "model": defaults(DSCTConfig),
            "matcher": defaults(MatcherConfig),
            "loss": defaults(LossConfig),
            "optimizer": defaults(OptimizerConfig),
            "data": defaults(DataConfig),
            "train": defaults(TrainConfig),
        }
    )


def use_network(config: ConfigDict, name: str) -> None:
    """Another network in place of DSCT, and training as its authors do it."""
    network: Any = NETWORKS[name].config
    config.model = ConfigDict(defaults(network))
    for section, values in network.published.items():
        config[section].update(values)
