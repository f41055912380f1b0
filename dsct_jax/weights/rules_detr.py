"""The tables of the DETR family: the names that the authors' published weights have.

A line is a kind of layer, their name and ours. `T.` is `transformer.`, `E` a layer of the encoder,
`D` one of the decoder, in both.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from dsct_jax.weights.rules import (
    DECODER,
    DEFORMABLE_TRANSFORMER,
    ENCODER,
    Rule,
    TensorLayout,
    module,
    packed_attention,
    resnet_rules,
)

_SHORT = {"T.": "transformer.", "E.": f"{ENCODER}.", "D.": f"{DECODER}."}
_C5 = """
conv    input_proj             input_proj
packed  E.self_attn            E/self_attention
norm    E.norm{n}              E/norm{n}
linear  E.linear{n}            E/feedforward/linear{n}
norm    D.norm{n}              D/norm{n}
linear  D.linear{n}            D/feedforward/linear{n}
norm    T.decoder.norm         decoder_norm
linear  class_embed            class_head
linear  bbox_embed.layers.{n}  box_head/layer{n}
"""
_DETR = """
packed  D.self_attn          D/self_attention
packed  D.multihead_attn     D/cross_attention
tensor  query_embed.weight   queries
"""
CONDITIONAL = """
linear  D.sa_qcontent_proj              D/self_attention/query_content
linear  D.sa_qpos_proj                  D/self_attention/query_position
linear  D.sa_kcontent_proj              D/self_attention/key_content
linear  D.sa_kpos_proj                  D/self_attention/key_position
linear  D.sa_v_proj                     D/self_attention/value
linear  D.self_attn.out_proj            D/self_attention/out_proj
linear  D.ca_qcontent_proj              D/cross_attention/query_content
linear  D.ca_qpos_proj                  D/cross_attention/query_position
linear  D.ca_qpos_sine_proj             D/cross_attention/query_waves
linear  D.ca_kcontent_proj              D/cross_attention/key_content
linear  D.ca_kpos_proj                  D/cross_attention/key_position
linear  D.ca_v_proj                     D/cross_attention/value
linear  D.cross_attn.out_proj           D/cross_attention/out_proj
linear  T.decoder.query_scale.layers.{n}  query_scale/{n}
"""
_POINTS = """
linear  T.decoder.ref_point_head.layers.{n}   query_points/{n}
tensor  query_embed.weight                    queries
"""
_DAB = """
linear  T.decoder.ref_point_head.layers.{n}   box_positions/{n}
linear  T.decoder.ref_anchor_head.layers.{n}  size_scale/{n}
linear  T.encoder.query_scale.layers.{n}      position_scale/{n}
tensor  E.activation.weight                   E/feedforward/slope
tensor  D.activation.weight                   D/feedforward/slope
tensor  refpoint_embed.weight                 anchors
tensor  label_enc.weight                      label_embed
"""
_ANCHOR = """
conv    input_proj.0.0                        input_proj/conv
norm    input_proj.0.1                        input_proj/norm
packed  T.encoder_layers.{i}.self_attn        E/self_attention
norm    T.encoder_layers.{i}.norm1            E/norm1
linear  T.encoder_layers.{i}.ffn.linear{n}    E/feedforward/linear{n}
norm    T.encoder_layers.{i}.ffn.norm2        E/norm2
packed  T.decoder_layers.{i}.self_attn        D/self_attention
packed  T.decoder_layers.{i}.cross_attn       D/cross_attention
norm    T.decoder_layers.{i}.norm1            D/norm1
norm    T.decoder_layers.{i}.norm2            D/norm2
linear  T.decoder_layers.{i}.ffn.linear{n}    D/feedforward/linear{n}
norm    T.decoder_layers.{i}.ffn.norm2        D/norm3
tensor  T.pattern.weight                      patterns
tensor  T.position.weight                     points
linear  T.adapt_pos1d.0                       embed_one/0
linear  T.adapt_pos1d.2                       embed_one/1
linear  T.adapt_pos2d.0                       embed_both/0
linear  T.adapt_pos2d.2                       embed_both/1
linear  T.class_embed.0                       class_head
linear  T.bbox_embed.0.layers.{n}             box_head/layer{n}
"""
# all of those with deformable attention; each has some of these
_PYRAMID = """
linear  class_embed.{i}                   heads/classes/{i}
linear  bbox_embed.{i}.layers.{n}         heads/boxes/{i}/layer{n}
tensor  query_embed.weight                query_embed
linear  T.enc_output                      proposal_features/linear
norm    T.enc_output_norm                 proposal_features/norm
linear  T.enc_out_class_embed             proposal_heads/classes/0
linear  T.enc_out_bbox_embed.layers.{n}   proposal_heads/boxes/0/layer{n}
linear  T.pos_trans                       proposal_positions/linear
norm    T.pos_trans_norm                  proposal_positions/norm
linear  T.pix_trans                       proposal_contents/linear
norm    T.pix_trans_norm                  proposal_contents/norm
linear  T.decoder.ref_point_head.layers.{n}  position_head/{n}
linear  T.decoder.query_scale.layers.{n}  position_scale/{n}
norm    T.decoder.norm                    decoder_norm
tensor  refpoint_embed.weight             box_embed
tensor  label_enc.weight                  label_embed
"""
_CONTENT = "tensor  tgt_embed.weight  content_embed"
_DINO_CONTENT = "tensor  T.tgt_embed.weight  content_embed"
_SHARED = r"((?:transformer\.)?(?:class_embed|bbox_embed))\.([1-9]\d*)\.(.+)"  # one, in each layer
_BOX_COPIES = (("bbox_embed.", "transformer.decoder.bbox_embed."),)
_COPIES = (*_BOX_COPIES, ("class_embed.", "transformer.decoder.class_embed."))


def read_table(
    table: str,
    short: Mapping[str, str] = _SHORT,
    packed: Callable[[str, str], list[Rule]] = packed_attention,
) -> list[Rule]:
    """The rules of a table: `short` spells out how a name of theirs begins, `packed` is how they
    hold an attention whose query, key and value we keep together.
    """
    rules: list[Rule] = []
    for kind, theirs, ours in map(str.split, table.strip().splitlines()):
        for letters, long in short.items():
            theirs = re.sub(rf"^{re.escape(letters)}", long, theirs)
        ours = re.sub("^E/", "encoder/{i}/", re.sub("^D/", "decoder/{i}/", ours))
        if kind == "tensor":
            rules.append((theirs, ours, "same"))
        else:
            rules += packed(theirs, ours) if kind == "packed" else module(kind, theirs, ours)
    return rules


def _layout(title: str, marker: str, *tables: str, **how: Any) -> TensorLayout:
    """A layout that has a tensor `marker`."""
    start = DEFORMABLE_TRANSFORMER if _PYRAMID in tables else resnet_rules(*_BACKBONE)
    return TensorLayout(
        title=f"{title} (the authors' code)",
        marker=rf"(transformer\.)?{re.escape(marker)}",
        rules=(*start, *(rule for table in tables for rule in read_table(table))),
        left_out=r".*\.num_batches_tracked",
        repeats="num_decoder_layers",
        requires=(("norm", "frozen_batch"), ("subject_logit", False)),
        **how,
    )


_BACKBONE = "backbone.0.body.", "backbone"
_LAYER = "decoder.layers.0"
_ONE: dict[str, Any] = {"repeated": _SHARED}
_BOXES: dict[str, Any] = {"copied": _BOX_COPIES}
_BOTH: dict[str, Any] = {"copied": _COPIES}
_ANCHORS = "decoder.ref_anchor_head.layers.0.weight"
_BOX_HEAD = "decoder.bbox_embed.0.layers.0.weight"
DETR = _layout("DETR", f"{_LAYER}.multihead_attn.in_proj_weight", _C5, _DETR)
CONDITIONAL_DETR = _layout(
    "Conditional DETR", f"{_LAYER}.ca_qcontent_proj.weight", _C5, CONDITIONAL, _POINTS
)
DAB_DETR = _layout("DAB-DETR or DN-DETR", _ANCHORS, _C5, CONDITIONAL, _DAB, **_BOXES)
ANCHOR_DETR = _layout("Anchor DETR", "pattern.weight", _ANCHOR, **_ONE)
DEFORMABLE = _layout("Deformable DETR", "reference_points.weight", _PYRAMID, **_ONE)
REFINED = _layout("Deformable DETR with box refinement", _BOX_HEAD, _PYRAMID, **_BOXES)
TWO_STAGE = _layout("two-stage Deformable DETR", "pos_trans.weight", _PYRAMID, **_BOTH)
DAB_DEFORMABLE = _layout(
    "DAB-Deformable-DETR", "refpoint_embed.weight", _PYRAMID, _CONTENT, **_BOXES
)
DETA = _layout("DETA", "pix_trans.weight", _PYRAMID, **_BOTH)
DINO = _layout("DINO", "enc_out_class_embed.weight", _PYRAMID, _DINO_CONTENT, **_BOTH, **_ONE)
