"""All kinds of files of others that we read and write."""

import re
from collections.abc import Iterable
from typing import Any

from dsct_jax.weights import rules_deformable as deformable
from dsct_jax.weights.rules import DEFORMABLE_DETR, DSCT, HUGGING_FACE, TORCHVISION, TensorLayout
from dsct_jax.weights.rules_detr import ANCHOR_DETR, CONDITIONAL_DETR, DAB_DETR, DETR
from dsct_jax.weights.rules_two_stage import two_stage_layout

_DEFORMABLE = deformable.DEFORMABLE, deformable.REFINED, deformable.TWO_STAGE
EXPORTS = {  # name of a network -> the layout of its authors' code
    "dsct": DSCT,
    "detr": DETR,
    "conditional_detr": CONDITIONAL_DETR,
    "dab_detr": DAB_DETR,
    "anchor_detr": ANCHOR_DETR,
    "dab_deformable_detr": deformable.DAB_DEFORMABLE,
    "dino": deformable.DINO,
    "deta": deformable.DETA,
}
LAYOUTS = (
    *(DSCT, HUGGING_FACE, DEFORMABLE_DETR),
    *(DETR, DAB_DETR, CONDITIONAL_DETR, ANCHOR_DETR),  # DAB-DETR has Conditional DETR's names too
    TORCHVISION,
)


def layout_of(config: Any) -> TensorLayout | None:
    """The layout of the authors' code for a network's configuration, None where there is none."""
    if config.name == "deformable_detr":
        return _DEFORMABLE[config.box_refinement + config.two_stage]
    if config.name == "two_stage":
        return two_stage_layout(config)
    return EXPORTS.get(config.name)


def detect_layout(names: Iterable[str], own: TensorLayout | None = None) -> TensorLayout | None:
    """Which of these kinds of file has these names; None when it is none of them. The network's
    `own` is tried first.
    """
    text, kinds = "\n".join(names), (*([own] if own else []), *LAYOUTS)
    return next((one for one in kinds if re.search(rf"^(?:{one.marker})$", text, re.M)), None)
