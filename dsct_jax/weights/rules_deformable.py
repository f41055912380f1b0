"""Published names of the deformable networks of the DETR family."""

import re
from typing import Any

from dsct_jax.weights.rules import DEFORMABLE_TRANSFORMER, Rule, TensorLayout, module


def _normed(torch: str, ours: str) -> list[Rule]:
    torch = f"transformer.{torch}"
    return [
        *module("linear", torch, f"{ours}/linear"),
        *module("norm", f"{torch}_norm", f"{ours}/norm"),
    ]


def _mlp(torch: str, ours: str) -> list[Rule]:
    return module("linear", f"{torch}.layers.{{n}}", ours)


_HEADS = (
    *module("linear", "class_embed.{i}", "heads/classes/{i}"),
    *_mlp("bbox_embed.{i}", "heads/boxes/{i}/layer{n}"),
)
_COMMON = (*DEFORMABLE_TRANSFORMER, *_HEADS)
_QUERIES: Rule = ("query_embed.weight", "query_embed", "same")
_PROPOSALS = _normed("enc_output", "proposal_features")
_TWO_STAGE = (*_COMMON, *_PROPOSALS, *_normed("pos_trans", "proposal_positions"))
_POSITION_HEAD = _mlp("transformer.decoder.ref_point_head", "position_head/{n}")
_BOXES = (("bbox_embed.", "transformer.decoder.bbox_embed."),)
_BOTH = (*_BOXES, ("class_embed.", "transformer.decoder.class_embed."))
_SHARED = r"(class_embed|bbox_embed)\.([1-9]\d*)\.(.+)"


def _layout(title: str, rules: tuple[Rule, ...], marker: str, **how: Any) -> TensorLayout:
    """A layout that has a tensor `marker`."""
    return TensorLayout(
        title=f"{title} (the authors' code)",
        marker=re.escape(marker),
        rules=rules,
        left_out=r".*\.num_batches_tracked",
        repeats="num_decoder_layers",
        requires=(("norm", "frozen_batch"), ("subject_logit", False)),
        **how,
    )


DEFORMABLE = _layout(
    "Deformable DETR",
    (*_COMMON, _QUERIES),
    "transformer.reference_points.weight",
    repeated=_SHARED,
)
REFINED = _layout(
    "Deformable DETR with box refinement",
    DEFORMABLE.rules,
    "transformer.decoder.bbox_embed.0.layers.0.weight",
    copied=_BOXES,
)
TWO_STAGE = _layout(
    "two-stage Deformable DETR",
    (*_TWO_STAGE, _QUERIES),
    "transformer.pos_trans.weight",
    copied=_BOTH,
)
DAB_DEFORMABLE = _layout(
    "DAB-Deformable-DETR",
    (
        *_COMMON,
        *_POSITION_HEAD,
        *_mlp("transformer.decoder.query_scale", "position_scale/{n}"),
        ("tgt_embed.weight", "content_embed", "same"),
        ("refpoint_embed.weight", "box_embed", "same"),
    ),
    "refpoint_embed.weight",
    copied=_BOXES,
)
DETA = _layout(
    "DETA",
    (*_TWO_STAGE, *_normed("pix_trans", "proposal_contents")),
    "transformer.pix_trans.weight",
    copied=_BOTH,
)
DINO = _layout(
    "DINO",
    (
        *_COMMON,
        *_PROPOSALS,
        *_POSITION_HEAD,
        *module("norm", "transformer.decoder.norm", "decoder_norm"),
        *module("linear", "transformer.enc_out_class_embed", "proposal_heads/classes/0"),
        *_mlp("transformer.enc_out_bbox_embed", "proposal_heads/boxes/0/layer{n}"),
        ("transformer.tgt_embed.weight", "content_embed", "same"),
        ("label_enc.weight", "label_embed", "same"),
    ),
    "transformer.enc_out_class_embed.weight",
    repeated=_SHARED,
    copied=_BOTH,
)
