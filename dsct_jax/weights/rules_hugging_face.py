"""The tables of the DETR family as the Hugging Face hub has its checkpoints: transformers' names.

A line is a kind of layer, their name and ours; `E.` is a layer of the encoder, `D.` one of the
decoder.
"""

import re
from typing import Any

from dsct_jax.weights.rules import (
    HF_BACKBONE,
    HF_DECODER,
    HF_ENCODER,
    HF_SPELLINGS,
    HUGGING_FACE,
    Rule,
    TensorLayout,
    module,
    packed_projections,
    resnet_rules,
)
from dsct_jax.weights.rules_detr import CONDITIONAL, read_table

_SHORT = {"E.": f"{HF_ENCODER}.", "D.": f"{HF_DECODER}."}
_C5 = """
conv    model.input_projection        input_proj
packed  E.self_attn                   E/self_attention
norm    E.self_attn_layer_norm        E/norm1
norm    E.final_layer_norm            E/norm2
linear  E.fc{n}                       E/feedforward/linear{n}
norm    model.decoder.layernorm       decoder_norm
linear  bbox_predictor.layers.{n}     box_head/layer{n}
"""
_DECODER = """
linear  D.fc{n}                       D/feedforward/linear{n}
norm    D.self_attn_layer_norm        D/norm1
norm    D.encoder_attn_layer_norm     D/norm2
norm    D.final_layer_norm            D/norm3
linear  class_labels_classifier       class_head
tensor  model.query_position_embeddings.weight  queries
"""
_DETR = """
packed  D.self_attn                   D/self_attention
packed  D.encoder_attn                D/cross_attention
"""
# the authors' names, but for three
_CONDITIONAL = CONDITIONAL.replace("D.cross_attn", "D.encoder_attn").replace("T.", "model.")
_CONDITIONAL += "linear  model.decoder.ref_point_head.layers.{n}  query_points/{n}"
_DAB = """
linear  D.self_attn.self_attn_query_content_proj     D/self_attention/query_content
linear  D.self_attn.self_attn_query_pos_proj         D/self_attention/query_position
linear  D.self_attn.self_attn_key_content_proj       D/self_attention/key_content
linear  D.self_attn.self_attn_key_pos_proj           D/self_attention/key_position
linear  D.self_attn.self_attn_value_proj             D/self_attention/value
linear  D.self_attn.self_attn.output_proj            D/self_attention/out_proj
norm    D.self_attn.self_attn_layer_norm             D/norm1
linear  D.cross_attn.cross_attn_query_content_proj   D/cross_attention/query_content
linear  D.cross_attn.cross_attn_query_pos_proj       D/cross_attention/query_position
linear  D.cross_attn.cross_attn_query_pos_sine_proj  D/cross_attention/query_waves
linear  D.cross_attn.cross_attn_key_content_proj     D/cross_attention/key_content
linear  D.cross_attn.cross_attn_key_pos_proj         D/cross_attention/key_position
linear  D.cross_attn.cross_attn_value_proj           D/cross_attention/value
linear  D.cross_attn.cross_attn.output_proj          D/cross_attention/out_proj
norm    D.cross_attn.cross_attn_layer_norm           D/norm2
linear  D.fc{n}                                      D/feedforward/linear{n}
norm    D.final_layer_norm                           D/norm3
tensor  D.activation_fn.weight                       D/feedforward/slope
tensor  E.activation_fn.weight                       E/feedforward/slope
linear  model.encoder.query_scale.layers.{n}         position_scale/{n}
linear  model.decoder.query_scale.layers.{n}         query_scale/{n}
linear  model.decoder.ref_point_head.layers.{n}      box_positions/{n}
linear  model.decoder.ref_anchor_head.layers.{n}     size_scale/{n}
tensor  model.query_refpoint_embeddings.weight       anchors
linear  class_embed                                  class_head
"""
_PYRAMID = """
linear  class_embed.{i}                   heads/classes/{i}
linear  bbox_embed.{i}.layers.{n}         heads/boxes/{i}/layer{n}
tensor  model.query_position_embeddings.weight  query_embed
linear  model.enc_output                  proposal_features/linear
norm    model.enc_output_norm             proposal_features/norm
linear  model.pos_trans                   proposal_positions/linear
norm    model.pos_trans_norm              proposal_positions/norm
"""


def _split_attention(theirs: str, ours: str) -> list[Rule]:
    rules = packed_projections(theirs, f"{ours}/in_proj")
    return rules + module("linear", f"{theirs}.out_proj", f"{ours}/out_proj")


def _rules(table: str) -> list[Rule]:
    return read_table(table, _SHORT, _split_attention)


def _layout(title: str, marker: str, *rules: Rule, **how: Any) -> TensorLayout:
    return TensorLayout(
        title=f"{title} (Hugging Face)",
        marker=re.escape(marker),
        rules=rules,
        spellings=HF_SPELLINGS,
        left_out=r".*\.num_batches_tracked",
        requires=(("norm", "frozen_batch"), ("subject_logit", False)),
        **how,
    )


def _c5(title: str, marker: str, *tables: str) -> TensorLayout:
    rules = [rule for table in (_C5, *tables) for rule in _rules(table)]
    return _layout(title, marker, *resnet_rules(HF_BACKBONE, "backbone"), *rules)


_DEFORMABLE = [rule for rule in HUGGING_FACE.rules if rule[1] != "context_queries"]
_COPIES = (
    ("bbox_embed.", "model.decoder.bbox_embed."),
    ("class_embed.", "model.decoder.class_embed."),
)
_SHARED = r"(class_embed|bbox_embed)\.([1-9]\d*)\.(.+)"
_FIRST, _LEVELS = "model.decoder.layers.0.", "model.level_embed"
_ALL = (*_DEFORMABLE, *_rules(_PYRAMID))
HF_LAYOUTS = {  # by the name of a network
    "detr": _c5("DETR", f"{_FIRST}encoder_attn.q_proj.weight", _DECODER, _DETR),
    "conditional_detr": _c5(
        "Conditional DETR", f"{_FIRST}ca_qcontent_proj.weight", _DECODER, _CONDITIONAL
    ),
    "dab_detr": _c5("DAB-DETR", "model.query_refpoint_embeddings.weight", _DAB),
}
# of deformable_detr: plain, with box refinement, two-stage
HF_DEFORMABLE = (
    _layout("Deformable DETR", _LEVELS, *_ALL, repeated=_SHARED),
    _layout("Deformable DETR with box refinement", _LEVELS, *_ALL, copied=_COPIES),
    _layout("two-stage Deformable DETR", _LEVELS, *_ALL, copied=_COPIES),
)
