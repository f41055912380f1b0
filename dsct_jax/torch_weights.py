"""Tables of (PyTorch name, our parameter, layout), read in both directions: released DSCT weights in, ours out.

A placeholder such as {i} stands for a number and takes the same value on both sides. Every name must be matched by exactly one rule, and
every parameter must be supplied: anything else is an error that names the tensor, never a silent gap.
"""

import re
from collections.abc import Mapping

import numpy as np

from dsct_jax.boxes import AnyArray
from dsct_jax.errors import UserError

# layout: same = as it is; linear = (out, in) <-> (in, out); conv = (out, in, h, w) <-> (h, w, in, out)
_TO_OURS = {"same": lambda x: x, "linear": lambda x: x.T, "conv": lambda x: x.transpose(2, 3, 1, 0)}
_TO_TORCH = {"same": lambda x: x, "linear": lambda x: x.T, "conv": lambda x: x.transpose(3, 2, 0, 1)}

Rule = tuple[str, str, str]


def _norm(torch: str, ours: str) -> list[Rule]:
    return [(f"{torch}.weight", f"{ours}/scale", "same"), (f"{torch}.bias", f"{ours}/bias", "same")]


def _batch_norm(torch: str, ours: str) -> list[Rule]:
    return _norm(torch, ours) + [(f"{torch}.running_{x}", f"{ours}/{x}", "same") for x in ("mean", "var")]


def _linear(torch: str, ours: str) -> list[Rule]:
    return [(f"{torch}.weight", f"{ours}/kernel", "linear"), (f"{torch}.bias", f"{ours}/bias", "same")]


def _deformable_attention(torch: str, ours: str) -> list[Rule]:
    parts = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    return [rule for part in parts for rule in _linear(f"{torch}.{part}", f"{ours}/{part}")]


def resnet_rules(torch: str, ours: str) -> list[Rule]:
    """torchvision's ResNet below the prefix `torch` (ending in a dot, or empty)."""
    block = f"{torch}layer{{s}}.{{i}}"
    mine = f"{ours}/layer{{s}}/{{i}}"
    rules = [(f"{torch}conv1.weight", f"{ours}/stem/conv/kernel", "conv"), *_batch_norm(f"{torch}bn1", f"{ours}/stem/norm")]
    for c in range(3):
        rules.append((f"{block}.conv{c + 1}.weight", f"{mine}/convs/{c}/kernel", "conv"))
        rules += _batch_norm(f"{block}.bn{c + 1}", f"{mine}/norms/{c}")
    rules.append((f"{block}.downsample.0.weight", f"{mine}/shortcut_conv/kernel", "conv"))
    return rules + _batch_norm(f"{block}.downsample.1", f"{mine}/shortcut_norm")


def _layer(stack: str) -> list[Rule]:
    torch, ours = f"transformer.{stack}.layers.{{i}}", f"{stack}/{{i}}"
    rules = _norm(f"{torch}.norm1", f"{ours}/norm1") + _norm(f"{torch}.norm2", f"{ours}/norm2")
    for part in ("linear1", "linear2"):
        rules += _linear(f"{torch}.{part}", f"{ours}/feedforward/{part}")
    return rules


RELEASED: list[Rule] = [
    *resnet_rules("backbone.0.body.", "backbone"),
    ("input_proj.{i}.0.weight", "input_proj/{i}/conv/kernel", "conv"),
    ("input_proj.{i}.0.bias", "input_proj/{i}/conv/bias", "same"),
    *_norm("input_proj.{i}.1", "input_proj/{i}/norm"),
    ("transformer.level_embed", "level_embed", "same"),
    *_layer("encoder"),
    *_deformable_attention("transformer.encoder.layers.{i}.self_attn", "encoder/{i}/self_attention"),
    *_layer("decoder"),
    *_norm("transformer.decoder.layers.{i}.norm3", "decoder/{i}/norm3"),
    *_deformable_attention("transformer.decoder.layers.{i}.cross_attn", "decoder/{i}/cross_attention"),
    ("transformer.decoder.layers.{i}.self_attn.in_proj_weight", "decoder/{i}/self_attention/in_proj/kernel", "linear"),
    ("transformer.decoder.layers.{i}.self_attn.in_proj_bias", "decoder/{i}/self_attention/in_proj/bias", "same"),
    *_linear("transformer.decoder.layers.{i}.self_attn.out_proj", "decoder/{i}/self_attention/out_proj"),
    *_linear("transformer.reference_points", "reference_points"),
    ("query_embed.weight", "context_queries", "same"),
    ("query_embed_dsct.weight", "subject_queries", "same"),
    *_linear("class_embed_dsct.0", "class_head"),
    *(rule for i in range(3) for rule in _linear(f"bbox_embed_dsct.0.layers.{i}", f"box_head/layer{i}")),
]

# The released modules list one shared head once a decoder layer; entry 0 is read, the others must equal it.
SHARED_HEADS = re.compile(r"(class_embed_dsct|bbox_embed_dsct)\.([1-9]\d*)\.(.+)")


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template)))


def _translate(name: str, rules: list[tuple[str, str, str]]) -> tuple[str, str]:
    found = [(m, target, layout) for source, target, layout in rules if (m := _pattern(source).fullmatch(name))]
    if len(found) != 1:
        raise UserError(f"weights: tensor {name!r} is matched by {len(found)} rules instead of one; is this file of another model?")
    match, target, layout = found[0]
    return target.format(**match.groupdict()), layout


def from_torch(state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], *, rules: list[Rule] = RELEASED) -> dict[str, np.ndarray]:
    """PyTorch tensors by name -> our arrays by path, float32.

    `shapes` are our paths and their shapes: each must be supplied once and fit. Raises UserError naming every tensor that is unknown, missing,
    doubled or of another shape; nothing is returned then.
    """
    taken: dict[str, np.ndarray] = {}
    problems: list[str] = []
    for name, tensor in state.items():
        repeated = SHARED_HEADS.fullmatch(name)
        if repeated:
            original = f"{repeated[1]}.0.{repeated[3]}"
            if original not in state or not np.array_equal(state[original], tensor):
                problems.append(f"{name} differs from {original}, which it should repeat")
            continue
        path, layout = _translate(name, rules)
        array = np.asarray(_TO_OURS[layout](np.asarray(tensor)), np.float32)
        if path in taken:
            problems.append(f"{name} supplies {path} a second time")
        elif path not in shapes:
            problems.append(f"{name} is unknown to this model (no {path})")
        elif array.shape != tuple(shapes[path]):
            problems.append(f"{name} has shape {array.shape} where the model has {tuple(shapes[path])} at {path}")
        taken[path] = array
    problems += [f"{path} is missing" for path in shapes if path not in taken]
    if problems:
        raise UserError(f"weights: {len(problems)} tensors do not fit the model: " + "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else ""))
    return taken


def to_torch(parameters: Mapping[str, AnyArray], *, num_decoder_layers: int, rules: list[Rule] = RELEASED) -> dict[str, np.ndarray]:
    """Our arrays by path -> PyTorch tensors by released name, the shared heads repeated for every decoder layer."""
    reverse = [(ours, torch, layout) for torch, ours, layout in rules]
    state: dict[str, np.ndarray] = {}
    for path, array in parameters.items():
        name, layout = _translate(path, reverse)
        tensor = np.ascontiguousarray(_TO_TORCH[layout](np.asarray(array)))
        state[name] = tensor
        head = re.fullmatch(r"(class_embed_dsct|bbox_embed_dsct)\.0\.(.+)", name)
        if head:
            state |= {f"{head[1]}.{i}.{head[2]}": tensor for i in range(1, num_decoder_layers)}
    return state
