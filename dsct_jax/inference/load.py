"""A trained model, ready to use: from a run directory, a .safetensors file, the hub, or a released
.pth.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from dsct_jax.batch import FlatParams, Predictions
from dsct_jax.boxes import AnyArray
from dsct_jax.config import dataclass_from_dict, read_config, require, to_builtins
from dsct_jax.crops import CropConfig
from dsct_jax.errors import UserError
from dsct_jax.evaluation.calibration import stored_decoder
from dsct_jax.inference.programs import Programs
from dsct_jax.postprocess import Decoder
from dsct_jax.preprocess import Preprocessing
from dsct_jax.weights.hub import local_path
from dsct_jax.weights.native import parse_config, read_native
from dsct_jax.weights.rules import from_torch
from dsct_jax.weights.run_directory import parse_run_path, require_same_model, require_same_shapes
from dsct_jax.weights.tensor_files import PTH_SUFFIXES, read_pth, write_safetensors

if TYPE_CHECKING:
    from dsct_jax.model.build import Network


class Model:
    """A network with its weights, in evaluation mode, and what is needed to use it: how images are
    prepared for it, and the decoder that reads its answers.
    """

    def __init__(
        self,
        functions: "Network | None",
        params: FlatParams,
        norm_stats: FlatParams,
        config: Mapping[str, Any],
        *,
        decoder: Decoder | None = None,
    ):
        """`functions`: None = built of `config` when something needs it that was not compiled."""
        self.config = to_builtins(config)
        self.decoder = decoder_of(self.config) if decoder is None else decoder
        self.params, self.norm_stats = jax.device_put((dict(params), dict(norm_stats)))
        self.preprocessing = preprocessing_of(self.config)
        if functions is not None:
            self.functions = functions
        values = self.params | self.norm_stats
        shapes = {name: (*value.shape, str(value.dtype)) for name, value in values.items()}
        self.programs = Programs([self.config["model"], len(self.class_names), shapes])

    @functools.cached_property
    def functions(self) -> "Network":
        """The network without its weights."""
        from dsct_jax.model.build import Network  # flax, which a compiled program does not need

        return Network(model_config(self.config))

    @functools.cached_property
    def _forward(self) -> Callable[..., Predictions]:
        functions = self.functions

        def forward(params, norm_stats, images, mask, details):
            return functions.bind(params, norm_stats)(images, mask, return_details=details)

        return jax.jit(forward, static_argnums=4)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The emotions, in the order of the logits."""
        return self.decoder.class_names

    @functools.cached_property
    def crops(self) -> CropConfig | None:
        """What a two-stage network sees of a person; None for a network that finds its people."""
        section = self.config["model"]
        names = [field.name for field in dataclasses.fields(CropConfig)]
        if not section.keys() >= {*names}:  # told without flax, which the network's own needs
            return None
        return dataclass_from_dict(CropConfig, "model", {name: section[name] for name in names})

    @property
    def multi_label(self) -> bool:
        """Whether a person can have several emotions."""
        return self.decoder.multi_label

    def __call__(
        self,
        images: Float[AnyArray, "b h w 3"],
        padding_mask: Bool[AnyArray, "b h w"] | Float[AnyArray, "b s s 3"],
        *,
        return_details: bool = False,
    ) -> Predictions:
        """Normalized float32 images and their padding (True) -> logits [layers b q k+1] and boxes
        [layers b q 4]; the last layer is the answer. Compiles once per shape. A two-stage network
        takes normalized contexts and subjects.
        """
        inputs = jnp.asarray(images), jnp.asarray(padding_mask)
        arguments = self.params, self.norm_stats, *inputs
        if return_details or isinstance(inputs[0], jax.core.Tracer):
            return self._forward(*arguments, return_details)

        def answer(*arguments: Any) -> tuple[Any, Any]:
            predictions = self._forward(*arguments, False)
            return predictions.logits, predictions.boxes

        name = "x".join(map(str, inputs[0].shape[:3]))
        program = self.programs.get(name, answer, arguments)
        return Predictions(*program(*arguments))

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
    from dsct_jax.model.build import network_config

    classes = require(config, "class_names", tuple)
    return network_config(require(config, "model", Mapping), len(classes))


def load(path: Path | str, config: Mapping[str, Any] | Path | str | None = None) -> Model:
    """Reads a model: a run directory, a .safetensors file of `Model.save`, hf:ORG/NAME[@REVISION]
    on the Hugging Face hub, or a released .pth.

    Args:
        path: RUN means its newest checkpoint, RUN/checkpoints/STEP that one.
        config: a mapping, a file, or the name of a preset such as "emotic_r50_released". Only a
            released .pth needs one, to say which variant it is; otherwise it replaces the stored
            one, and must describe the same model.

    Raises:
        UserError: the file or directory is missing, unreadable, or of another model.
    """
    path = local_path(path)
    given = None if config is None else read_config(config)
    if path.suffix in PTH_SUFFIXES and path.is_file():
        return _load_pth(path, given)
    weights = read_native(path)
    chosen = _chosen(path, weights.config, given)
    if weights.step is None:
        decoder = _decoder_in(weights.metadata, decoder_of(chosen), path)
    else:
        workdir, _ = parse_run_path(path)
        decoder = stored_decoder(decoder_of(chosen), weights.metadata, workdir, weights.step)
    model = Model(None, weights.params, weights.norm_stats, chosen, decoder=decoder)
    if not model.programs.known:  # otherwise they fitted when those were compiled
        shapes = model.functions.param_shapes | model.functions.norm_stats_shapes
        require_same_shapes(shapes, {**weights.params, **weights.norm_stats}, str(path))
    return model


def _load_pth(path: Path, given: Mapping[str, Any] | None) -> Model:
    from dsct_jax.model.build import Network

    tensors, texts = read_pth(path)  # with a configuration where `export` wrote it
    stored = parse_config(texts["config"], path) if "config" in texts else None
    chosen = _chosen(path, stored, given)
    network = Network(model_config(chosen))
    shapes = network.param_shapes, network.norm_stats_shapes
    flat = from_torch(tensors, shapes[0] | shapes[1])
    params, norm_stats = ({name: flat[name] for name in part} for part in shapes)
    decoder = _decoder_in(texts, decoder_of(chosen), path)
    return Model(network, params, norm_stats, chosen, decoder=decoder)


def _chosen(
    path: Path, stored: Mapping[str, Any] | None, given: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """The given configuration, or else the stored one."""
    chosen = stored if given is None else given
    if chosen is None:
        remedy = "give a configuration, such as emotic_r50_released"
        raise UserError(f"{path}: a .pth file does not say which variant it is; {remedy}")
    if stored is not None and given is not None:
        require_same_model(stored, given, str(path))
    return chosen


def _decoder_in(texts: Mapping[str, str], decoder: Decoder, path: Path) -> Decoder:
    """`decoder` with the fit in a file's texts; older files call it "calibration"."""
    fit = texts.get("decoder", texts.get("calibration"))
    return decoder if fit is None else decoder.with_fit(fit, where=str(path))
