"""Tables of (PyTorch name, our parameter, layout), read in both directions: third-party weights in,
ours out.

A placeholder such as {i} stands for a number and takes the same value on both sides. Each name must
be matched by exactly one rule, and each parameter that a table knows must be supplied.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dsct_jax.boxes import AnyArray
from dsct_jax.errors import UserError

# How a tensor lies: same = as it is; linear = (out, in) <-> (in, out); conv = (out, in, h, w) <->
# (h, w, in, out). A number behind a colon says that the tensor is that third of ours, along the
# last axis: query, key and value, which we keep packed.
_TO_OURS = {"same": lambda x: x, "linear": lambda x: x.T, "conv": lambda x: x.transpose(2, 3, 1, 0)}
_TO_TORCH = _TO_OURS | {"conv": lambda x: x.transpose(3, 2, 0, 1)}
_RANKS = {"linear": 2, "conv": 4}
_QKV = 3

Rule = tuple[str, str, str]
NAMED_PROBLEMS = 12  # of more, an error only gives the number
_Pieces = dict[str, dict[int, tuple[str, np.ndarray]]]  # path -> third (0 = whole) -> (name, array)


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """How a kind of file names its tensors."""

    title: str
    marker: str  # regex: a file with such a name is of this kind
    rules: tuple[Rule, ...]
    # (regex, replacement), tried on the start of a name: other spellings of the names in `rules`
    spellings: tuple[tuple[str, str], ...] = ()
    left_out: str = r"(?!)"  # regex: tensors that have no place in our model
    # regex (prefix).(number).(rest): copies of entry 0, which they must equal, and the field of
    # config.model that counts them
    repeated: str = r"(?!)"
    repeats: str = ""
    copied: tuple[tuple[str, str], ...] = ()  # (prefix, prefix of equal copies)
    # fields of config.model without which such a file does not fit, and what else its code computes
    requires: tuple[tuple[str, Any], ...] = ()
    computes: tuple[tuple[str, Any], ...] = ()

    def require_fields(self, config: Any, where: str) -> None:
        """Raises UserError unless a network's configuration has what such a file requires."""
        for field, value in self.requires:
            if (found := getattr(config, field, None)) != value:
                known = f"config.model.{field}={value} only"
                raise UserError(f"{where}: {self.title} knows {known}; set it instead of {found}")


_PARTS = {  # of a module: (PyTorch, ours, layout)
    "conv": [("weight", "kernel", "conv"), ("bias", "bias", "same")],
    "linear": [("weight", "kernel", "linear"), ("bias", "bias", "same")],
    "norm": [("weight", "scale", "same"), ("bias", "bias", "same")],
    "batch_norm": [
        *[("weight", "scale", "same"), ("bias", "bias", "same")],
        *[("running_mean", "mean", "same"), ("running_var", "var", "same")],
    ],
}
_ATTENTION = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")


def module(kind: str, torch: str, ours: str) -> list[Rule]:
    """A layer: kind is conv, linear, norm or batch_norm."""
    return [(f"{torch}.{theirs}", f"{ours}/{mine}", how) for theirs, mine, how in _PARTS[kind]]


def _deformable_attention(torch: str, ours: str) -> list[Rule]:
    parts = (module("linear", f"{torch}.{part}", f"{ours}/{part}") for part in _ATTENTION)
    return [rule for rules in parts for rule in rules]


def packed_attention(torch: str, ours: str) -> list[Rule]:
    """torch.nn.MultiheadAttention."""
    return [
        (f"{torch}.in_proj_weight", f"{ours}/in_proj/kernel", "linear"),
        (f"{torch}.in_proj_bias", f"{ours}/in_proj/bias", "same"),
        *module("linear", f"{torch}.out_proj", f"{ours}/out_proj"),
    ]


def packed_projections(torch: str, ours: str) -> list[Rule]:
    return [
        (theirs, mine, f"{how}:{i}")
        for i, part in enumerate("qkv")
        for theirs, mine, how in module("linear", f"{torch}.{part}_proj", ours)
    ]


def resnet_rules(torch: str, ours: str) -> list[Rule]:
    """torchvision's ResNet below the prefix `torch` (ending in a dot, or empty)."""
    block, mine = f"{torch}layer{{s}}.{{i}}", f"{ours}/layer{{s}}/{{i}}"
    convs = {
        f"{torch}conv1": f"{ours}/stem/conv",
        f"{block}.downsample.0": f"{mine}/shortcut_conv",
        **{f"{block}.conv{c + 1}": f"{mine}/convs/{c}" for c in range(3)},
    }
    norms = {
        f"{torch}bn1": f"{ours}/stem/norm",
        f"{block}.downsample.1": f"{mine}/shortcut_norm",
        **{f"{block}.bn{c + 1}": f"{mine}/norms/{c}" for c in range(3)},
    }
    return [
        *((f"{conv}.weight", f"{path}/kernel", "conv") for conv, path in convs.items()),
        *(rule for pair in norms.items() for rule in module("batch_norm", *pair)),
    ]


def _transformer(backbone: str, projection: str, rest: str, cross: str, linear: str) -> list[Rule]:
    """What the original Deformable DETR and Hugging Face's have alike but for these names."""
    encoder, decoder = f"{rest}encoder.layers.{{i}}", f"{rest}decoder.layers.{{i}}"
    return [
        *resnet_rules(backbone, "backbone"),
        *module("conv", f"{projection}.{{i}}.0", "input_proj/{i}/conv"),
        *module("norm", f"{projection}.{{i}}.1", "input_proj/{i}/norm"),
        (f"{rest}level_embed", "level_embed", "same"),
        *_deformable_attention(f"{encoder}.self_attn", "encoder/{i}/self_attention"),
        *module("linear", f"{encoder}.{linear}{{n}}", "encoder/{i}/feedforward/linear{n}"),
        *_deformable_attention(f"{decoder}.{cross}", "decoder/{i}/cross_attention"),
        *module("linear", f"{decoder}.self_attn.out_proj", "decoder/{i}/self_attention/out_proj"),
        *module("linear", f"{decoder}.{linear}{{n}}", "decoder/{i}/feedforward/linear{n}"),
        *module("linear", f"{rest}reference_points", "reference_points"),
    ]


ENCODER, DECODER = "transformer.encoder.layers.{i}", "transformer.decoder.layers.{i}"
_IN_PROJ = "decoder/{i}/self_attention/in_proj"
_ORIGINAL_TRANSFORMER: tuple[Rule, ...] = (
    *_transformer("backbone.0.body.", "input_proj", "transformer.", "cross_attn", "linear"),
    *module("norm", f"{ENCODER}.norm{{n}}", "encoder/{i}/norm{n}"),
    (f"{DECODER}.self_attn.in_proj_weight", f"{_IN_PROJ}/kernel", "linear"),
    (f"{DECODER}.self_attn.in_proj_bias", f"{_IN_PROJ}/bias", "same"),
    *module("norm", f"{DECODER}.norm{{n}}", "decoder/{i}/norm{n}"),
    ("query_embed.weight", "context_queries", "same"),
)

DEFORMABLE_TRANSFORMER = tuple(
    rule for rule in _ORIGINAL_TRANSFORMER if rule[1] != "context_queries"
)

HF_BACKBONE = "model.backbone.conv_encoder.model."
HF_ENCODER, HF_DECODER = "model.encoder.layers.{i}", "model.decoder.layers.{i}"
_HUGGING_FACE: tuple[Rule, ...] = (
    *_transformer(HF_BACKBONE, "model.input_proj", "model.", "encoder_attn", "fc"),
    *module("norm", f"{HF_ENCODER}.self_attn_layer_norm", "encoder/{i}/norm1"),
    *module("norm", f"{HF_ENCODER}.final_layer_norm", "encoder/{i}/norm2"),
    *packed_projections(f"{HF_DECODER}.self_attn", _IN_PROJ),
    *module("norm", f"{HF_DECODER}.encoder_attn_layer_norm", "decoder/{i}/norm1"),
    *module("norm", f"{HF_DECODER}.self_attn_layer_norm", "decoder/{i}/norm2"),
    *module("norm", f"{HF_DECODER}.final_layer_norm", "decoder/{i}/norm3"),
    ("model.query_position_embeddings.weight", "context_queries", "same"),
)

# A backbone of transformers' own ResNet instead of timm's, which has torchvision's names.
_HF_RESNET_SPELLINGS = (
    (rf"{HF_BACKBONE}embedder\.embedder\.convolution\.", rf"{HF_BACKBONE}conv1."),
    (rf"{HF_BACKBONE}embedder\.embedder\.normalization\.", rf"{HF_BACKBONE}bn1."),
    *(
        (
            rf"{HF_BACKBONE}encoder\.stages\.{s}\.layers\.(\d+)\.{theirs}{kind}\.",
            rf"{HF_BACKBONE}layer{s + 1}.\1.{name}.",
        )
        for s in range(4)
        for theirs, conv, norm in [
            (r"shortcut\.", "downsample.0", "downsample.1"),
            *((rf"layer\.{c}\.", f"conv{c + 1}", f"bn{c + 1}") for c in range(3)),
        ]
        for kind, name in (("convolution", conv), ("normalization", norm))
    ),
)

TORCHVISION = TensorLayout(
    title="torchvision ResNet",
    marker=r"layer1\.0\.conv1\.weight",
    rules=tuple(resnet_rules("", "backbone")),
    left_out=r"fc\.(weight|bias)|.*\.num_batches_tracked",
    requires=(("norm", "frozen_batch"),),
)


def _left_out(prefix: str) -> str:
    """Heads and proposals of a detector, as a regex."""
    return (
        rf"({prefix}decoder\.)?(class|bbox)_embed\..*|{prefix}(enc_output|pos_trans)(_norm)?\..*"
        r"|.*\.num_batches_tracked"
    )


DEFORMABLE_DETR = TensorLayout(
    title="Deformable DETR (original code)",
    marker=r"transformer\.encoder\.layers\.0\.self_attn\.sampling_offsets\.weight",
    rules=_ORIGINAL_TRANSFORMER,
    left_out=_left_out(r"transformer\."),
)

_HF_PARTS = "backbone|encoder|decoder|input_proj|query_position_embeddings|level_embed"
HF_SPELLINGS = (
    (rf"(?=({_HF_PARTS}|reference_points)\b)", "model."),  # the bare model
    (r"model\.backbone\.model\.", HF_BACKBONE),  # as transformers 5 holds it in memory
    (r"(model\.(?:en|de)coder\.layers\.\d+)\.mlp\.", r"\1."),
    (r"(model\.decoder\.layers\.\d+\.self_attn)\.o_proj\.", r"\1.out_proj."),
    *_HF_RESNET_SPELLINGS,
)
HUGGING_FACE = TensorLayout(
    title="Deformable DETR (Hugging Face)",
    marker=r"(model\.)?(encoder\.layers\.0\.self_attn\.sampling_offsets\.weight"
    r"|query_position_embeddings\.weight)",
    rules=_HUGGING_FACE,
    spellings=HF_SPELLINGS,
    left_out=_left_out(r"model\."),
)

RELEASED: tuple[Rule, ...] = (
    *_ORIGINAL_TRANSFORMER,
    ("query_embed_dsct.weight", "subject_queries", "same"),
    *module("linear", "class_embed_dsct.0", "class_head"),
    *module("linear", "bbox_embed_dsct.0.layers.{n}", "box_head/layer{n}"),
)

DSCT = TensorLayout(
    title="DSCT (the authors' code)",
    marker=r"query_embed_dsct\.weight|class_embed_dsct\.0\.weight",
    rules=RELEASED,
    left_out=r".*\.num_batches_tracked",
    # their modules list the one shared head once per decoder layer
    repeated=r"(class_embed_dsct|bbox_embed_dsct)\.([1-9]\d*)\.(.+)",
    repeats="num_decoder_layers",
    requires=(("norm", "frozen_batch"), ("box_refinement", False)),
    computes=(("fusion", "released"), ("semantic_selection", "largest")),
)


@dataclasses.dataclass(frozen=True)
class Translation:
    """What became of a file's tensors."""

    arrays: dict[str, np.ndarray]  # ours, float32
    taken: list[str]  # names in the file
    left_out: list[str]  # names in the file that have no place in our model
    unmatched: list[str]  # our paths that this kind of file does not have
    problems: list[str]  # per tensor that is unknown, missing, doubled or of another shape


def from_torch(
    state: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    layout: TensorLayout = DSCT,
    where: str = "weights",
) -> dict[str, np.ndarray]:
    """PyTorch tensors by name -> our arrays by path, float32: the whole model, whose `shapes` these
    are. Raises UserError naming, after `where`, every tensor that does not fit.
    """
    found = translate(state, shapes, layout=layout)
    missing = [f"{path} is missing" for path in found.unmatched]
    require_fit(found.problems + missing, where=where)
    return found.arrays


def require_fit(problems: list[str], *, where: str = "weights") -> None:
    """Raises UserError that names the problems, unless there are none."""
    if problems:
        named = problems[:NAMED_PROBLEMS] + ["..."] * (len(problems) > NAMED_PROBLEMS)
        count = f"{len(problems)} tensors do not fit the model"
        raise UserError(f"{where}: {count}: {'; '.join(named)}")


def translate(
    state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], *, layout: TensorLayout
) -> Translation:
    """PyTorch tensors by name -> our arrays of these `shapes`, and an account of every tensor."""
    pieces: _Pieces = {}
    left_out: list[str] = []
    problems: list[str] = []
    for name, tensor in state.items():
        original = original_of(name, layout)
        if re.fullmatch(layout.left_out, name):
            left_out.append(name)
        elif original != name:
            left_out.append(name)
            if original not in state or not np.array_equal(state[original], tensor):
                problems.append(f"{name} differs from {original}, which it should repeat")
        elif problem := _place(name, np.asarray(tensor), shapes, layout, pieces):
            problems.append(problem)
    arrays: dict[str, np.ndarray] = {}
    for path, shape in shapes.items():
        thirds = pieces.get(path, {})
        expected = {third for _, _, third in torch_names(path, layout)}
        if lacking := expected - thirds.keys():
            lost = ", ".join(("query", "key", "value")[i] for i in sorted(lacking))
            part = f" (its {lost} part)" if len(expected) > 1 else ""
            # unless it is there in another shape, which is said already
            if not any(text.endswith(f" at {path}") for text in problems):
                problems.append(f"{path} is missing{part}")
        elif expected:
            parts = [thirds[i][1] for i in sorted(thirds)]
            array = parts[0] if len(parts) == 1 else np.concatenate(parts, -1)
            arrays[path] = np.ascontiguousarray(array, np.float32).reshape(shape)
    taken = [name for path in arrays for name, _ in pieces[path].values()]
    unmatched = [path for path in shapes if not has_rule(path, layout)]
    return Translation(arrays, taken, left_out, unmatched, problems)


def _place(
    name: str,
    tensor: np.ndarray,
    shapes: Mapping[str, tuple[int, ...]],
    layout: TensorLayout,
    pieces: _Pieces,
) -> str | None:
    """Puts one tensor among the `pieces`; what is wrong with it otherwise."""
    found = _matches(_canonical(name, layout), layout.rules)
    if len(found) != 1:
        return f"{name!r} is matched by {len(found)} rules instead of one"
    path, how, third = found[0]
    if path not in shapes:
        return f"{name} is unknown to this model (no {path})"
    if third in pieces.get(path, {}):
        return f"{name} supplies {path} a second time (after {pieces[path][third][0]})"
    shape = tuple(shapes[path])
    wanted = (*shape[:-1], shape[-1] // _QKV) if len(torch_names(path, layout)) > 1 else shape
    array = _TO_OURS[how](tensor) if tensor.ndim == _RANKS.get(how, tensor.ndim) else tensor
    if array.shape != wanted:
        return f"{name} has shape {array.shape} where the model has {wanted} at {path}"
    pieces.setdefault(path, {})[third] = (name, array)
    return None


def to_torch(
    parameters: Mapping[str, AnyArray], *, layout: TensorLayout = DSCT, repeats: int = 1
) -> dict[str, np.ndarray]:
    """Our arrays by path -> PyTorch tensors by name, shared heads `repeats` times. Raises UserError
    for paths that this kind of file has no name for, which `has_rule` says beforehand.
    """
    if nameless := [path for path in parameters if not has_rule(path, layout)]:
        named = ", ".join(nameless[:NAMED_PROBLEMS])
        raise UserError(f"weights: {layout.title} has no name for {named}")
    state: dict[str, np.ndarray] = {}
    for path, array in parameters.items():
        found = torch_names(path, layout)
        for name, how, third in found:
            thirds = np.split(np.asarray(array), _QKV, axis=-1) if len(found) > 1 else [array]
            tensor = np.array(_TO_TORCH[how](np.asarray(thirds[third])), order="C")
            shared = [name.replace(".0.", f".{i}.", 1) for i in range(1, repeats)]
            names: list[str] = [name]
            names += [other for other in shared if re.fullmatch(layout.repeated, other)]
            for start, copy in layout.copied:
                names += [copy + one.removeprefix(start) for one in names if one.startswith(start)]
            state |= dict.fromkeys(names, tensor)
    return state


def has_rule(path: str, layout: TensorLayout) -> bool:
    """Whether this kind of file has tensors for our `path`."""
    return bool(torch_names(path, layout))


def original_of(name: str, layout: TensorLayout) -> str:
    """The tensor that this one repeats; itself where it repeats none."""
    for prefix, copy in layout.copied:
        if name.startswith(copy):
            name = prefix + name.removeprefix(copy)
    repeated = re.fullmatch(layout.repeated, name)
    return f"{repeated[1]}.0.{repeated[3]}" if repeated else name


def _canonical(name: str, layout: TensorLayout) -> str:
    for pattern, replacement in layout.spellings:
        if match := re.match(pattern, name):
            name = match.expand(replacement) + name[match.end() :]
    return name


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template)))


def _matches(name: str, rules: Iterable[Rule]) -> list[tuple[str, str, int]]:
    """(translated name, layout, third) by every rule that fits `name`."""
    found = []
    for source, target, layout in rules:
        if match := _pattern(source).fullmatch(name):
            how, _, third = layout.partition(":")
            found.append((target.format(**match.groupdict()), how, int(third or 0)))
    return found


def torch_names(path: str, layout: TensorLayout) -> list[tuple[str, str, int]]:
    """(name, layout, third) of the tensors that make up our `path`."""
    return _matches(path, [(ours, theirs, how) for theirs, ours, how in layout.rules])
