"""The tables of the two-stage networks: the names that their code gives its tensors."""

from dsct_jax.weights.rules import Rule, TensorLayout, module, resnet_rules

_BATCHES = r".*\.num_batches_tracked"


def _convs(torch: str, ours: str) -> list[Rule]:
    convs, norms = f"{torch}.convs.{{i}}", f"{torch}.bn.{{i}}"
    return [
        *module("conv", convs, f"{ours}/convs/{{i}}"),
        *module("batch_norm", norms, f"{ours}/norms/{{i}}"),
    ]


def _linears(prefix: str, **names: str) -> list[Rule]:
    """Ours by theirs, which may not hold a slash."""
    pairs = ((prefix + theirs, mine) for theirs, mine in names.items())
    return [rule for pair in pairs for rule in module("linear", *pair)]


_NET = "two_stream_net."
CAER_NET_S = TensorLayout(
    title="CAER-Net-S (public re-implementation)",
    marker=r"two_stream_net\.face_encoding_module\.convs\.0\.weight",
    rules=(
        *_convs(f"{_NET}face_encoding_module", "face"),
        *_convs(f"{_NET}context_encoding_module", "context"),
        *_convs(f"{_NET}attention_inference_module", "attention"),
        *module("batch_norm", "fusion_net.face_bn", "face_norm"),
        *module("batch_norm", "fusion_net.context_bn", "context_norm"),
        *_linears("fusion_net.", face_1="face_score/0", face_2="face_score/1"),
        *_linears("fusion_net.", context_1="context_score/0", context_2="context_score/1"),
        *_linears("fusion_net.", fc1="hidden", fc2="class_head"),
    ),
    left_out=_BATCHES,
)

_GLAMOR_HEAD = {
    "attention_fc1": "attention/fc1",
    "attention_fc2": "attention/fc2",
    "face_weight1": "face_score/0",
    "face_weight2": "face_score/1",
    "context_weight1": "context_score/0",
    "context_weight2": "context_score/1",
    "final_fc1": "hidden",
    "final_classify": "class_head",
}
_KERAS = {
    "conv": {"kernel": "kernel", "bias": "bias"},
    "bn": {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"},
}


def _keras(kind: str, theirs: str, ours: str) -> list[Rule]:
    """A layer as Keras names it, whose tensors lie as ours."""
    return [(f"{theirs}/{a}", f"{ours}/{b}", "same") for a, b in _KERAS[kind].items()]


GLAMOR_NET = TensorLayout(
    title="GLAMOR-Net (the authors' code)",
    marker=r"FaceEncodingNet/blocks/0/conv/kernel",
    rules=(
        *(
            rule
            for net, ours in (("FaceEncodingNet", "face"), ("ContextEncodingNet", "context"))
            for kind, mine in (("conv", "convs"), ("bn", "norms"))
            for rule in _keras(kind, f"{net}/blocks/{{i}}/{kind}", f"{ours}/{mine}/{{i}}")
        ),
        *_keras("bn", "attention_fc1_bn", "attention/norm"),
        *(rule for pair in _GLAMOR_HEAD.items() for rule in _keras("conv", *pair)),
    ),
)

GLAMOR_NET_RESNET = TensorLayout(
    title="GLAMOR-Net (ResNet)",
    marker=r"face\.conv1\.weight",
    rules=(
        *resnet_rules("face.", "face"),
        *resnet_rules("context.", "context"),
        *module("batch_norm", "attention_bn", "attention/norm"),
        *_linears("", **_GLAMOR_HEAD),
    ),
    left_out=_BATCHES,
)

EMO_NET = TensorLayout(
    title="EMO-Net (public re-implementation)",
    marker=r"fusion\.fc_cat\.weight",
    rules=(
        *resnet_rules("context.", "context"),
        *resnet_rules("body.", "face"),
        *module("batch_norm", "fusion.bn1", "hidden_norm"),
        *_linears("fusion.", fc1="hidden", fc_cat="class_head", fc_cont="rating_head"),
    ),
    left_out=_BATCHES,
)


def two_stage_layout(config: object) -> TensorLayout:
    """That of the code whose network this configuration is."""
    if getattr(config, "fusion", None) == "linear":
        return EMO_NET
    if getattr(config, "attention", None) == "caer":
        return CAER_NET_S
    return GLAMOR_NET_RESNET if getattr(config, "has_resnet", False) else GLAMOR_NET
