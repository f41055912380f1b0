"""All kinds of files of others that we read and write."""

import re
from collections.abc import Iterable

from dsct_jax.weights.rules import DEFORMABLE_DETR, DSCT, HUGGING_FACE, TORCHVISION, TensorLayout
from dsct_jax.weights.rules_detr import ANCHOR_DETR, CONDITIONAL_DETR, DAB_DETR, DETR

EXPORTS = {  # name of a network -> the layout of its authors' code
    "dsct": DSCT,
    "detr": DETR,
    "conditional_detr": CONDITIONAL_DETR,
    "dab_detr": DAB_DETR,
    "anchor_detr": ANCHOR_DETR,
}
LAYOUTS = (
    *(DSCT, HUGGING_FACE, DEFORMABLE_DETR),
    *(DETR, DAB_DETR, CONDITIONAL_DETR, ANCHOR_DETR),  # DAB-DETR has Conditional DETR's names too
    TORCHVISION,
)


def detect_layout(names: Iterable[str]) -> TensorLayout | None:
    """Which of these kinds of file has these names; None when it is none of them."""
    text = "\n".join(names)
    return next((one for one in LAYOUTS if re.search(rf"^(?:{one.marker})$", text, re.M)), None)
