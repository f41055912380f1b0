"""The paper's ablations: the rows of its tables as changes of a configuration, with the numbers it
printed.

Source: "Two in One Go", ACM MM 2024, Tables 3, 5 to 13 and Figure 11. Its runs start from
COCO weights on EMOTIC (mAP) or CAER-S (accuracy); a run on other data has the same rows and other
numbers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsct_jax.config import defaults
from dsct_jax.errors import UserError
from dsct_jax.model.build import NETWORKS
from dsct_jax.model.dsct import ContextConfig
from dsct_jax.model.family import PyramidConfig
from dsct_jax.model.modalities import MODALITIES

TABLES = ("3", "5", "6", "7", "8", "9", "10", "11", "12", "13", "figure11", "context")
UNCHANGED = "as_configured"  # the key of the row that changes nothing; tables share it

_ORDINALS = ("1st", "2nd", "3rd")
_PAPER_DECODER_LAYERS = 6
_Changes = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting of a table."""

    name: str  # as the table calls it
    changes: _Changes  # "section.field" -> value, on top of the configuration
    paper: Mapping[str, float] = dataclasses.field(
        default_factory=dict
    )  # column -> percent, as printed
    key: str = (
        ""  # of its directory: rows of different tables with the same changes share their runs
    )


@dataclasses.dataclass(frozen=True)
class Table:
    """A table for one configuration."""

    title: str
    rows: tuple[Row, ...]
    by_people: bool = (
        False  # one column for each number of people in the image instead of one number (Table 12)
    )
    reach: float = 0.0  # with the cost of each row, and how soon it is so accurate (Table 10)


def paper_table(name: str, config: Mapping[str, Any]) -> Table:
    """The table `name` of TABLES for a complete configuration; numbers of queries and layers follow
    the size of its model.

    Raises:
        UserError: there is no such table, or it makes no sense for the configuration.
    """
    makers = {
        "3": _coefficients, "5": _subject_queries, "6": _components, "7": _reweighting,
        "8": _fusion_location, "9": _backbones, "10": _detectors, "11": _localization,
        "12": _people, "13": _modalities, "figure11": _neighbors, "context": _context_variants,
    }  # fmt: skip
    if name not in makers:
        raise UserError(f"--table={name}: must be one of {', '.join(TABLES)}")
    model = config["model"]
    if name in ("6", "7", "8", "12", "figure11", "context") and not (
        model["num_context_queries"] and model["num_decoder_layers"] > 1
    ):
        raise UserError(
            f"--table={name}: needs config.model.num_context_queries above 0 and several decoder "
            "layers"
        )
    table = makers[name](config)
    return dataclasses.replace(
        table,
        rows=tuple(dataclasses.replace(row, key=_key(row.changes, config)) for row in table.rows),
    )


def _key(changes: _Changes, config: Mapping[str, Any]) -> str:
    """'model.num_subject_queries=4', readable and the same for the same setting, whichever table
    asks for it.
    """
    real = {
        field: value
        for field, value in changes.items()
        if config[field.split(".")[0]].get(field.split(".")[1]) != value
        and field != "model.modality_weights"  # files, which model.modalities stands for
    }
    return ",".join(f"{field}={_text(value)}" for field, value in sorted(real.items())) or UNCHANGED


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _coefficients(config: Mapping[str, Any]) -> Table:
    printed = {
        (5, 2): 35.41, (10, 2): 35.89, (15, 2): 35.41, (2, 5): 36.01, (2, 10): 34.99,
        (2, 15): 34.64, (2, 2): 35.94, (5, 5): 35.00, (10, 10): 35.05, (15, 15): 34.75,
        (1, 10): 34.70, (1, 8): 35.45,
    }  # fmt: skip
    rows = [
        Row(
            f"theta_cls {theta}, lambda_cls {weight}",
            {"matcher.cost_class": float(theta), "loss.weight_class": float(weight)},
            {"EMOTIC": value},
        )
        for (theta, weight), value in printed.items()
    ]
    return Table(
        "Table 3: coefficients of classification (matching cost theta, loss lambda)", tuple(rows)
    )


def _subject_queries(config: Mapping[str, Any]) -> Table:
    emotic = (37.14, 36.71, 36.61, 37.26, 36.70, 36.97, 36.03, 36.26, 35.92, 35.68)
    caer_s = (91.78, 91.57, 91.39, 91.57, 91.47, 91.52, 91.59, 91.42, 91.81, 91.44)
    rows = [
        Row(f"{n} subject queries", {"model.num_subject_queries": n}, {"EMOTIC": a, "CAER-S": b})
        for n, (a, b) in enumerate(zip(emotic, caer_s, strict=True), 1)
    ]
    return Table("Table 5: number of subject queries", tuple(rows))


def _components(config: Mapping[str, Any]) -> Table:
    model = config["model"]
    spatial, semantic, context = (
        model[f"num_{name}"]
        for name in ("spatial_neighbors", "semantic_neighbors", "context_queries")
    )
    if not (spatial and semantic):
        raise UserError(
            "--table=6: needs config.model.num_spatial_neighbors and num_semantic_neighbors above 0"
        )
    rows = (
        Row("baseline: no context queries", {"model.num_context_queries": 0}, {"EMOTIC": 36.55}),
        Row("decouple-fuse: all context queries", _selected(context, 0), {"EMOTIC": 36.73}),
        Row("+ spatial selection", _selected(spatial, 0), {"EMOTIC": 37.11}),
        Row("+ semantic selection", _selected(0, semantic), {"EMOTIC": 36.85}),
        Row("+ both selections", _selected(spatial, semantic), {"EMOTIC": 37.26}),
    )
    return Table("Table 6: components", rows)


def _selected(spatial: int, semantic: int) -> _Changes:
    return {"model.num_spatial_neighbors": spatial, "model.num_semantic_neighbors": semantic}


def _reweighting(config: Mapping[str, Any]) -> Table:
    printed = {"semantic": 37.26, "equal": 36.73, "spatial": 36.48, "attentive": 36.93}
    return Table(
        "Table 7: re-weighting",
        tuple(
            Row(name, {"model.reweighting": name}, {"EMOTIC": value})
            for name, value in printed.items()
        ),
    )


def _context_variants(config: Mapping[str, Any]) -> Table:
    last = (config["model"]["num_decoder_layers"] - 1,)
    scaled, gate = {"model.reweighting": "scaled"}, {"model.context_gate": True}
    late: _Changes = {"model.fusion_layers": last}
    return Table(
        "Ours: context that pays",
        (
            Row("no context queries", {"model.num_context_queries": 0}, {}),
            Row("the paper's fusion", {}, {}),
            Row("scaled relevance", scaled, {}),
            Row("gate from 0", gate, {}),
            Row("scaled, gate from 0", scaled | gate, {}),
            Row("scaled, gate from 0, last layer", scaled | gate | late, {}),
        ),
    )


def _fusion_location(config: Mapping[str, Any]) -> Table:
    """First fusing layer as a share of the decoder's depth; of settings that coincide in a shallow
    decoder the first row stays.
    """
    layers = config["model"]["num_decoder_layers"]
    rows: dict[int, Row] = {}
    for start, value in {0: 37.01, 1: 36.58, 3: 36.82, 5: 36.44}.items():
        first = start * layers // _PAPER_DECODER_LAYERS
        name = (
            f"{_ordinal(first)} to {_ordinal(layers - 1)} layer"
            if first < layers - 1
            else f"{_ordinal(first)} layer only (late)"
        )
        rows.setdefault(
            first, Row(name, {"model.fusion_layers": _from_layer(first, layers)}, {"EMOTIC": value})
        )
    return Table("Table 8: fusing layers", tuple(rows.values()))


def _from_layer(first: int, layers: int) -> tuple[int, ...]:
    return () if first == 0 else tuple(range(first, layers))


def _ordinal(layer: int) -> str:
    return _ORDINALS[layer] if layer < len(_ORDINALS) else f"{layer + 1}th"


def _backbones(config: Mapping[str, Any]) -> Table:
    printed = {
        "resnet18": (35.68, 84.98), "resnet34": (34.40, 84.52), "resnet50": (37.26, 91.81),
        "resnet101": (37.81, 85.39), "resnet152": (37.32, 83.88), "wide_resnet50": (34.46, 85.71),
        "wide_resnet101": (34.07, 83.16),
    }  # fmt: skip
    rows = [
        Row(name, {"model.backbone": name}, {"EMOTIC": a, "CAER-S": b})
        for name, (a, b) in printed.items()
    ]
    return Table("Table 9: backbones", tuple(rows))


def network_section(name: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section of another network, of the size of this one."""
    sizes = defaults(PyramidConfig).keys() & model.keys() - {"name"}
    network = defaults(NETWORKS[name].config)
    return network | {field: model[field] for field in sizes & network.keys()}


def _detectors(config: Mapping[str, Any]) -> Table:
    """All of one size, with as many queries as the configuration has subjects and context, and its
    optimizer and losses: the authors' own, for COCO, are those of configs/table10.
    """
    model = config["model"]
    n = model["num_subject_queries"] + model["num_context_queries"]
    two_stage = {"box_refinement": True, "two_stage": True}
    newer = {"mixed_selection": True, "look_forward_twice": True, "num_one_to_many": 2 * n}
    anchors = {"num_queries": max(1, n // 3), "dilation": True}
    rows: dict[str, tuple[float | None, str, _Changes]] = {
        "DETR": (89.74, "detr", {"dilation": True}),
        "Anchor DETR": (90.42, "anchor_detr", anchors),
        "DAB-DETR": (87.49, "dab_detr", {"dilation": True}),
        "DN-DETR": (89.79, "dab_detr", {"dilation": True, "denoising_groups": 5}),
        "Conditional DETR": (90.07, "conditional_detr", {"dilation": True}),
        "DINO": (89.27, "dino", {"num_denoising": 50}),
        "Deformable DETR": (None, "deformable_detr", {}),
        "DAB-Deformable-DETR": (91.39, "dab_deformable_detr", {}),
        "H-Deformable-DETR": (91.65, "deformable_detr", two_stage | newer),
        "DETA": (91.77, "deta", {"num_candidates": 100}),
        "DSCT (on Deformable DETR)": (91.81, "dsct", {}),
        "ours: DSCT by DINO's recipe": (None, "dsct_dino", {"num_denoising": 50}),
    }
    made = []
    for name, (value, network, changes) in rows.items():
        if network == "dsct_dino":
            n = model["num_subject_queries"]
            fields = defaults(ContextConfig)
            changes = {field: model[field] for field in fields} | changes
        if network != "dsct":
            changes = {"name": network, "num_queries": n, "subject_logit": True} | changes
        paper = {} if value is None else {"CAER-S": value}
        made.append(Row(name, {f"model.{field}": x for field, x in changes.items()}, paper))
    return Table("Table 10: detectors", tuple(made), reach=0.7)


def _modalities(config: Mapping[str, Any]) -> Table:
    model = config["model"]
    files = dict(zip(model["modalities"], model["modality_weights"], strict=False))
    if len(files) != len(MODALITIES):
        raise UserError(
            f"--table=13: needs config.model.modalities={MODALITIES} and their files in "
            "config.model.modality_weights"
        )
    printed = {"none": 37.26, "scene": 32.08, "semantic": 34.01, "instance": 34.11}
    rows = []
    for name, value in printed.items():
        used = () if name == "none" else (name,)
        weights = tuple(files[one] for one in used)
        changes = {"model.modalities": used, "model.modality_weights": weights}
        rows.append(Row(name, changes, {"EMOTIC": value}))
    return Table("Table 13: extra modalities, frozen", tuple(rows))


def _localization(config: Mapping[str, Any]) -> Table:
    printed = {1.0: 35.61, 5.0: 36.67, 10.0: 36.45, 15.0: 36.61}
    return Table(
        "Table 11: coefficient of localisation",
        tuple(
            Row(f"lambda_box {weight:g}", {"loss.weight_bbox": weight}, {"EMOTIC": value})
            for weight, value in printed.items()
        ),
    )


def _people(config: Mapping[str, Any]) -> Table:
    printed = {
        "late fusion": (36.94, 35.02, 31.21, 40.52, 35.36),
        "early fusion": (36.91, 35.20, 31.20, 40.96, 35.97),
    }
    layers = config["model"]["num_decoder_layers"]
    first_layers = {"late fusion": layers - 1, "early fusion": 0}
    rows = [
        Row(
            name,
            {"model.fusion_layers": _from_layer(first_layers[name], layers)},
            dict(zip(("1", "2", "3", "4", ">=5"), values, strict=True)),
        )
        for name, values in printed.items()
    ]
    return Table(
        "Table 12: late and early fusion by people in the image", tuple(rows), by_people=True
    )


def _neighbors(config: Mapping[str, Any]) -> Table:
    """Shares of all context queries as the paper's 50, 100, 200 and 300 of 300. The figure prints
    no numbers: its best are K_sp 100 and K_sm 50.
    """
    context = config["model"]["num_context_queries"]
    counts = [max(1, round(context * share / 300)) for share in (50, 100, 200, 300)]
    rows = [
        Row(f"K_sp {spatial}, K_sm {semantic}", _selected(spatial, semantic))
        for spatial in counts
        for semantic in counts
    ]
    return Table("Figure 11: numbers of selected context queries", tuple(rows))
