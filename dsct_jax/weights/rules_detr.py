"""The tables of the DETR family: the names that the authors' published weights have."""

from dsct_jax.weights.rules import (
    DECODER,
    ENCODER,
    Rule,
    TensorLayout,
    module,
    packed_attention,
    resnet_rules,
)

_BACKBONE = tuple(resnet_rules("backbone.0.body.", "backbone"))
_BATCHES = r".*\.num_batches_tracked"
_C5: tuple[Rule, ...] = (
    *_BACKBONE,
    *module("conv", "input_proj", "input_proj"),
    *packed_attention(f"{ENCODER}.self_attn", "encoder/{i}/self_attention"),
    *module("norm", f"{ENCODER}.norm{{n}}", "encoder/{i}/norm{n}"),
    *module("linear", f"{ENCODER}.linear{{n}}", "encoder/{i}/feedforward/linear{n}"),
    *module("norm", f"{DECODER}.norm{{n}}", "decoder/{i}/norm{n}"),
    *module("linear", f"{DECODER}.linear{{n}}", "decoder/{i}/feedforward/linear{n}"),
    *module("norm", "transformer.decoder.norm", "decoder_norm"),
    *module("linear", "class_embed", "class_head"),
    *module("linear", "bbox_embed.layers.{n}", "box_head/layer{n}"),
)

DETR = TensorLayout(
    title="DETR (original code)",
    marker=r"transformer\.decoder\.layers\.0\.multihead_attn\.in_proj_weight",
    rules=(
        *_C5,
        *packed_attention(f"{DECODER}.self_attn", "decoder/{i}/self_attention"),
        *packed_attention(f"{DECODER}.multihead_attn", "decoder/{i}/cross_attention"),
        ("query_embed.weight", "queries", "same"),
    ),
    left_out=_BATCHES,
    requires=(("norm", "frozen_batch"),),
)


def _mlp(torch: str, ours: str) -> list[Rule]:
    return module("linear", f"transformer.{torch}.layers.{{n}}", f"{ours}/{{n}}")


_CONDITIONAL_PROJECTIONS = {
    "sa": {
        "qcontent": "query_content",
        "qpos": "query_position",
        "kcontent": "key_content",
        "kpos": "key_position",
        "v": "value",
    }
}
_CONDITIONAL_PROJECTIONS["ca"] = {**_CONDITIONAL_PROJECTIONS["sa"], "qpos_sine": "query_waves"}
_CONDITIONAL: tuple[Rule, ...] = (
    *_C5,
    *(
        rule
        for kind, place in (("sa", "self"), ("ca", "cross"))
        for theirs, mine in _CONDITIONAL_PROJECTIONS[kind].items()
        for rule in module(
            "linear", f"{DECODER}.{kind}_{theirs}_proj", f"decoder/{{i}}/{place}_attention/{mine}"
        )
    ),
    *module("linear", f"{DECODER}.self_attn.out_proj", "decoder/{i}/self_attention/out_proj"),
    *module("linear", f"{DECODER}.cross_attn.out_proj", "decoder/{i}/cross_attention/out_proj"),
    *_mlp("decoder.query_scale", "query_scale"),
)
CONDITIONAL_DETR = TensorLayout(
    title="Conditional DETR (original code)",
    marker=r"transformer\.decoder\.layers\.0\.ca_qcontent_proj\.weight",
    rules=(
        *_CONDITIONAL,
        *_mlp("decoder.ref_point_head", "query_points"),
        ("query_embed.weight", "queries", "same"),
    ),
    left_out=_BATCHES,
    requires=(("norm", "frozen_batch"),),
)
DAB_DETR = TensorLayout(
    title="DAB-DETR or DN-DETR (original code)",
    marker=r"transformer\.decoder\.ref_anchor_head\.layers\.0\.weight",
    rules=(
        *_CONDITIONAL,
        *_mlp("decoder.ref_point_head", "box_positions"),
        *_mlp("decoder.ref_anchor_head", "size_scale"),
        *_mlp("encoder.query_scale", "position_scale"),
        (f"{ENCODER}.activation.weight", "encoder/{i}/feedforward/slope", "same"),
        (f"{DECODER}.activation.weight", "decoder/{i}/feedforward/slope", "same"),
        ("refpoint_embed.weight", "anchors", "same"),
        ("label_enc.weight", "label_embed", "same"),
    ),
    left_out=_BATCHES,
    copied=(("bbox_embed.", "transformer.decoder.bbox_embed."),),
    requires=(("norm", "frozen_batch"),),
)


def _anchor_layer(torch: str, ours: str) -> list[Rule]:
    return [
        *packed_attention(f"{torch}.self_attn", f"{ours}/self_attention"),
        *module("norm", f"{torch}.norm1", f"{ours}/norm1"),
        *module("linear", f"{torch}.ffn.linear{{n}}", f"{ours}/feedforward/linear{{n}}"),
    ]


_ANCHOR_ENCODER = "transformer.encoder_layers.{i}"
_ANCHOR_DECODER = "transformer.decoder_layers.{i}"
ANCHOR_DETR = TensorLayout(
    title="Anchor DETR (original code)",
    marker=r"transformer\.pattern\.weight",
    rules=(
        *_BACKBONE,
        *module("conv", "input_proj.0.0", "input_proj/conv"),
        *module("norm", "input_proj.0.1", "input_proj/norm"),
        *_anchor_layer(_ANCHOR_ENCODER, "encoder/{i}"),
        *module("norm", f"{_ANCHOR_ENCODER}.ffn.norm2", "encoder/{i}/norm2"),
        *_anchor_layer(_ANCHOR_DECODER, "decoder/{i}"),
        *module("norm", f"{_ANCHOR_DECODER}.norm2", "decoder/{i}/norm2"),
        *packed_attention(f"{_ANCHOR_DECODER}.cross_attn", "decoder/{i}/cross_attention"),
        *module("norm", f"{_ANCHOR_DECODER}.ffn.norm2", "decoder/{i}/norm3"),
        ("transformer.pattern.weight", "patterns", "same"),
        ("transformer.position.weight", "points", "same"),
        *(
            rule
            for theirs, mine in (("1d", "embed_one"), ("2d", "embed_both"))
            for number in (0, 2)
            for rule in module(
                "linear", f"transformer.adapt_pos{theirs}.{number}", f"{mine}/{number // 2}"
            )
        ),
        *module("linear", "transformer.class_embed.0", "class_head"),
        *module("linear", "transformer.bbox_embed.0.layers.{n}", "box_head/layer{n}"),
    ),
    left_out=_BATCHES,
    repeated=r"(transformer\.(?:class|bbox)_embed)\.([1-9]\d*)\.(.+)",
    repeats="num_decoder_layers",
    requires=(("norm", "frozen_batch"),),
)
