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
from dsct_jax.evaluation.calibration import Calibration, calibration_of_run, parse_calibration
from dsct_jax.model.build import FlatParams, Network, network_config
from dsct_jax.preprocess import Preprocessing
from dsct_jax.training.checkpoint import (
    load_weights,
    newest_step,
    parse_run_path,
    require_same_shapes,
)
from dsct_jax.weights.rules import from_torch
from dsct_jax.weights.tensor_files import (
    PTH_SUFFIXES,
    read_pth,
    read_safetensors,
    write_safetensors,
)


class Model:
    """A network with its weights, in evaluation mode, and what is needed to use it: class names,
    label kind and preprocessing.
    """

    def __init__(
        self,
        functions: Network,
        params: FlatParams,
        norm_stats: FlatParams,
        config: Mapping[str, Any],
        *,
        calibration: Calibration | None = None,
    ):
        self.functions, self.config = functions, to_builtins(config)
        self.calibration = calibration
        self.thresholds = (
            None if calibration is None else calibration.thresholds
        )  # Eq. 4's t of each class, fitted on validation
        self.min_confidence = (
            None if calibration is None else calibration.min_confidence
        )  # from which a query is a person, fitted too
        self.params, self.norm_stats = jax.tree.map(jnp.asarray, (params, norm_stats))
        self.class_names: tuple[str, ...] = require(self.config, "class_names", tuple)
        self.multi_label: bool = require(self.config, "multi_label", bool)
        self.preprocessing = preprocessing_of(self.config)

        def forward(params, norm_stats, images, mask, details):
            return functions.bind(params, norm_stats)(images, mask, return_details=details)

        self._forward = jax.jit(forward, static_argnums=4)

    def __call__(
        self,
        images: Float[AnyArray, "b h w 3"],
        padding_mask: Bool[AnyArray, "b h w"],
        *,
        return_details: bool = False,
    ) -> Predictions:
        """Normalised float32 images and their padding (True) -> logits [layers b q k+1] and boxes
        [layers b q 4]; the last layer is the answer.

        `return_details` adds attention weights, sampling locations, reference points and selected
        context queries. Compiles once a shape.
        """
        return self._forward(
            self.params,
            self.norm_stats,
            jnp.asarray(images),
            jnp.asarray(padding_mask),
            return_details,
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Every value on the host, as params/PATH and frozen/PATH."""
        parts = {"params": self.params, "frozen": self.norm_stats}
        return {
            f"{part}/{path}": np.asarray(value)
            for part, values in parts.items()
            for path, value in values.items()
        }

    def save(self, path: Path | str, *, notes: Mapping[str, str] | None = None) -> None:
        """Writes weights and configuration into one .safetensors file that `load` reads; `notes`
        are texts to keep beside them.
        """
        fitted = {} if self.calibration is None else {"calibration": self.calibration.to_json()}
        write_safetensors(
            Path(path),
            self.arrays(),
            {**(notes or {}), **fitted, "config": json.dumps(self.config, sort_keys=True)},
        )


def preprocessing_of(config: Mapping[str, Any]) -> Preprocessing:
    """What the configuration does to a image before the network sees it."""
    data, fields = require(config, "data", Mapping), ("eval_short_side", "max_long_side", "buckets")
    if missing := [field for field in fields if field not in data]:
        raise UserError(f"config.data.{missing[0]}: missing; start from configs/base.py")
    short_side, max_long_side, buckets = (data[field] for field in fields)
    return Preprocessing(short_side=short_side, max_long_side=max_long_side, buckets=buckets)


def model_config(config: Mapping[str, Any]) -> Any:
    """The `model` section and the number of classes as the network's configuration."""
    classes = require(config, "class_names", tuple)
    return network_config(require(config, "model", Mapping), len(classes))


def load(path: Path | str, config: Mapping[str, Any] | Path | str | None = None) -> Model:
    """Reads a model: a run directory, a .safetensors file of `Model.save`, or a released .pth
    (which needs `config` for its variant).

    A run directory means its newest checkpoint, RUN/checkpoints/STEP that one. `config` (a mapping,
    a file, or a preset's name such as "emotic_r50_released") may be left out but for a .pth of
    others; given, it replaces the stored one and must describe the same weights. Raises UserError when the file or directory is missing, unreadable, or of another
    model.
    """
    path, config = Path(path), None if config is None else read_config(config)
    if path.suffix in PTH_SUFFIXES and path.is_file():
        tensors, texts = read_pth(path)
        if config is None and "config" in texts:  # written by `dsct_jax.commands.export`
            config = _parsed_config(texts["config"], path)
        if config is None:
            raise UserError(
                f"{path}: a .pth file does not say which variant it is; give a configuration, "
                "such as emotic_r50_released"
            )
        functions = Network(model_config(config))
        flat = from_torch(tensors, functions.param_shapes | functions.norm_stats_shapes)
        params, norm_stats = (
            {name: flat[name] for name in shapes}
            for shapes in (functions.param_shapes, functions.norm_stats_shapes)
        )
        return Model(
            functions,
            params,
            norm_stats,
            config,
            calibration=_parsed_calibration(texts, require(config, "class_names", tuple), path),
        )
    params, norm_stats, stored = read_native(path)
    chosen = stored if config is None else config
    class_names = require(chosen, "class_names", tuple)
    functions = Network(model_config(chosen))
    require_same_shapes(
        functions.param_shapes | functions.norm_stats_shapes, {**params, **norm_stats}, str(path)
    )
    return Model(
        functions, params, norm_stats, chosen, calibration=_read_calibration(path, class_names)
    )


def _read_calibration(path: Path, class_names: tuple[str, ...]) -> Calibration | None:
    """What was fitted on validation for these weights: beside a run's checkpoints, or inside a
    .safetensors file.
    """
    if path.is_dir():
        workdir, step = parse_run_path(path)
        return calibration_of_run(
            workdir, class_names=class_names, step=newest_step(workdir) if step is None else step
        )
    return _parsed_calibration(read_safetensors(path)[1], class_names, path)


def _parsed_calibration(
    texts: Mapping[str, str], class_names: tuple[str, ...], path: Path
) -> Calibration | None:
    return (
        parse_calibration(texts["calibration"], class_names=class_names, where=str(path))
        if "calibration" in texts
        else None
    )


def read_native(path: Path) -> tuple[FlatParams, FlatParams, dict[str, Any]]:
    """(parameters, norm statistics, configuration) of a run directory, one of its checkpoints, or
    a .safetensors file of `Model.save`.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if path.is_dir():
        params, norm_stats, metadata = load_weights(*parse_run_path(path))
        return params, norm_stats, to_builtins(metadata["config"])
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: neither a run directory nor a .safetensors or .pth file")
    arrays, strings = read_safetensors(path)
    if "config" not in strings:
        raise UserError(
            f"{path}: holds no configuration; only files written by this project's Model.save can "
            "be read"
        )
    params, norm_stats = (
        {k.removeprefix(p): v for k, v in arrays.items() if k.startswith(p)}
        for p in ("params/", "frozen/")
    )
    return params, norm_stats, _parsed_config(strings["config"], path)


def _parsed_config(text: str, path: Path) -> dict[str, Any]:
    try:
        return dict(to_builtins(json.loads(text)))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}: the configuration in it is damaged ({error}); copy the file again"
        ) from None
