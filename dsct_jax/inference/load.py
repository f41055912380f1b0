"""A trained model, ready to use: from a run directory, a .safetensors file, or a released .pth."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from dsct_jax.batch import Predictions
from dsct_jax.boxes import AnyArray
from dsct_jax.config import read_config, require, to_builtins
from dsct_jax.errors import UserError
from dsct_jax.evaluation.calibration import stored_decoder
from dsct_jax.model.build import FlatParams, Network, network_config
from dsct_jax.postprocess import Decoder
from dsct_jax.preprocess import Preprocessing
from dsct_jax.weights.native import parse_config, read_native
from dsct_jax.weights.rules import from_torch
from dsct_jax.weights.run_directory import parse_run_path, require_same_model, require_same_shapes
from dsct_jax.weights.tensor_files import PTH_SUFFIXES, read_pth, write_safetensors


class Model:
    """A network with its weights, in evaluation mode, and what is needed to use it: how images are
    prepared for it, and the decoder that reads its answers.
    """

    def __init__(
        self,
        functions: Network,
        params: FlatParams,
        norm_stats: FlatParams,
        config: Mapping[str, Any],
        *,
        decoder: Decoder | None = None,
    ):
        self.functions, self.config = functions, to_builtins(config)
        self.decoder = decoder_of(self.config) if decoder is None else decoder
        self.params, self.norm_stats = jax.tree.map(jnp.asarray, (params, norm_stats))
        self.preprocessing = preprocessing_of(self.config)

        def forward(params, norm_stats, images, mask, details):
            return functions.bind(params, norm_stats)(images, mask, return_details=details)

        self._forward = jax.jit(forward, static_argnums=4)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The emotions, in the order of the logits."""
        return self.decoder.class_names

    @property
    def multi_label(self) -> bool:
        """Whether a person can have several emotions."""
        return self.decoder.multi_label

    def __call__(
        self,
        images: Float[AnyArray, "b h w 3"],
        padding_mask: Bool[AnyArray, "b h w"],
        *,
        return_details: bool = False,
    ) -> Predictions:
        """Normalized float32 images and their padding (True) -> logits [layers b q k+1] and boxes
        [layers b q 4]; the last layer is the answer. Compiles once per shape.
        """
        inputs = jnp.asarray(images), jnp.asarray(padding_mask)
        return self._forward(self.params, self.norm_stats, *inputs, return_details)

    def arrays(self) -> dict[str, np.ndarray]:
        """Every value on the host, as params/PATH and frozen/PATH."""
        parts = {"params": self.params, "frozen": self.norm_stats}
        return {
            f"{part}/{path}": np.asarray(value)
            for part, values in parts.items()
            for path, value in values.items()
        }

    def save(self, path: Path | str, *, notes: Mapping[str, str] | None = None) -> None:
        """Writes weights, configuration, decoder and `notes` as .safetensors that `load` reads."""
        texts = {"decoder": self.decoder.to_dict(), "config": self.config}
        stored = {name: json.dumps(value, sort_keys=True) for name, value in texts.items()}
        write_safetensors(Path(path), self.arrays(), {**(notes or {}), **stored})


def preprocessing_of(config: Mapping[str, Any]) -> Preprocessing:
    """What the configuration does to an image before the network sees it."""
    data, fields = require(config, "data", Mapping), ("eval_short_side", "max_long_side", "buckets")
    if missing := [field for field in fields if field not in data]:
        raise UserError(f"config.data.{missing[0]}: missing; start from configs/base.py")
    return Preprocessing(*(data[field] for field in fields))


def decoder_of(config: Mapping[str, Any]) -> Decoder:
    """How the outputs of a configuration's weights are read, before anything is fitted."""
    return Decoder.unfitted(
        require(config, "class_names", tuple),
        multi_label=require(config, "multi_label", bool),
        class_loss=require(config, "loss", Mapping).get("class_loss", "focal"),
    )


def model_config(config: Mapping[str, Any]) -> Any:
    """The `model` section and the number of classes as the network's configuration."""
    classes = require(config, "class_names", tuple)
    return network_config(require(config, "model", Mapping), len(classes))


def load(path: Path | str, config: Mapping[str, Any] | Path | str | None = None) -> Model:
    """Reads a model: a run directory, a .safetensors file of `Model.save`, or a released .pth.

    Args:
        path: RUN means its newest checkpoint, RUN/checkpoints/STEP that one.
        config: a mapping, a file, or the name of a preset such as "emotic_r50_released". Only a
            released .pth needs one, to say which variant it is; otherwise it replaces the stored
            one, and must describe the same model.

    Raises:
        UserError: the file or directory is missing, unreadable, or of another model.
    """
    path = Path(path)
    given = None if config is None else read_config(config)
    if path.suffix in PTH_SUFFIXES and path.is_file():
        return _load_pth(path, given)
    weights = read_native(path)
    network, chosen = _network(path, weights.config, given)
    found = {**weights.params, **weights.norm_stats}
    require_same_shapes(network.param_shapes | network.norm_stats_shapes, found, str(path))
    if weights.step is None:
        decoder = _decoder_in(weights.metadata, decoder_of(chosen), path)
    else:
        workdir, _ = parse_run_path(path)
        decoder = stored_decoder(decoder_of(chosen), weights.metadata, workdir, weights.step)
    return Model(network, weights.params, weights.norm_stats, chosen, decoder=decoder)


def _load_pth(path: Path, given: Mapping[str, Any] | None) -> Model:
    tensors, texts = read_pth(path)  # with a configuration where `export` wrote it
    stored = parse_config(texts["config"], path) if "config" in texts else None
    network, chosen = _network(path, stored, given)
    shapes = network.param_shapes, network.norm_stats_shapes
    flat = from_torch(tensors, shapes[0] | shapes[1])
    params, norm_stats = ({name: flat[name] for name in part} for part in shapes)
    decoder = _decoder_in(texts, decoder_of(chosen), path)
    return Model(network, params, norm_stats, chosen, decoder=decoder)


def _network(
    path: Path, stored: Mapping[str, Any] | None, given: Mapping[str, Any] | None
) -> tuple[Network, Mapping[str, Any]]:
    """The network of the given configuration, or else of the stored one; and which it is."""
    chosen = stored if given is None else given
    if chosen is None:
        remedy = "give a configuration, such as emotic_r50_released"
        raise UserError(f"{path}: a .pth file does not say which variant it is; {remedy}")
    network = Network(model_config(chosen))
    if stored is not None:
        require_same_model(stored, chosen, str(path))
    return network, chosen


def _decoder_in(texts: Mapping[str, str], decoder: Decoder, path: Path) -> Decoder:
    """`decoder` with the fit in a file's texts; older files call it "calibration"."""
    fit = texts.get("decoder", texts.get("calibration"))
    return decoder if fit is None else decoder.with_fit(fit, where=str(path))
