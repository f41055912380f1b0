"""All kinds of files of others that we read and write."""

import re
from collections.abc import Iterable
from typing import Any

from dsct_jax.weights import rules_detr as family
from dsct_jax.weights.rules import DEFORMABLE_DETR, DSCT, HUGGING_FACE, TORCHVISION, TensorLayout
from dsct_jax.weights.rules_hugging_face import HF_DEFORMABLE, HF_LAYOUTS
from dsct_jax.weights.rules_two_stage import two_stage_layout

_DEFORMABLE = family.DEFORMABLE, family.REFINED, family.TWO_STAGE
_C5 = family.DETR, family.DAB_DETR, family.CONDITIONAL_DETR, family.ANCHOR_DETR
EXPORTS = {  # name of a network -> the layout of its authors' code
    "dsct": DSCT,
    "detr": family.DETR,
    "conditional_detr": family.CONDITIONAL_DETR,
    "dab_detr": family.DAB_DETR,
    "anchor_detr": family.ANCHOR_DETR,
    "dab_deformable_detr": family.DAB_DEFORMABLE,
    "dino": family.DINO,
    "deta": family.DETA,
}
LAYOUTS = (
    *(DSCT, HUGGING_FACE, DEFORMABLE_DETR),
    *_C5,  # DAB-DETR before Conditional DETR, whose names it has too
    TORCHVISION,
)


def layout_of(config: Any) -> TensorLayout | None:
    """The layout of the authors' code for a network's configuration, None where there is none."""
    if config.name == "deformable_detr":
        return _DEFORMABLE[config.box_refinement + config.two_stage]
    if config.name == "two_stage":
        return two_stage_layout(config)
    return EXPORTS.get(config.name)


def hugging_face_layout_of(config: Any) -> TensorLayout | None:
    """The same for the checkpoints of the Hugging Face hub."""
    if config.name == "deformable_detr":
        return HF_DEFORMABLE[config.box_refinement + config.two_stage]
    return HF_LAYOUTS.get(config.name)


def detect_layout(names: Iterable[str], *own: TensorLayout | None) -> TensorLayout | None:
    """Which kind of file has these names; None when it is none of them. The network's `own` are
    tried first.
    """
    text, kinds = "\n".join(names), (*filter(None, own), *LAYOUTS)
    return next((one for one in kinds if re.search(rf"^(?:{one.marker})$", text, re.M)), None)
