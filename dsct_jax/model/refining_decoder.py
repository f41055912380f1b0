"""The decoder of the deformable networks: every layer predicts, and where the network refines, the
next one samples inside the boxes of the one before.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.model.attention import LayerShape
from dsct_jax.model.decoder import DecoderLayer, in_each_map
from dsct_jax.model.encoder import Memory
from dsct_jax.model.heads import INITIAL_SIZE, BoxHead, ClassHead, refine
from dsct_jax.model.layers import LayerNorm, rematerialized
from dsct_jax.model.position import YXWH, sine_of
from dsct_jax.model.pyramid import QueryConfig


class Heads(nnx.Module):
    """A class and a box for each query: one copy that all layers share, or one per layer, and
    another one for proposals.
    """

    def __init__(self, config: QueryConfig, *, copies: int, large: bool, rngs: nnx.Rngs):
        """`large`: the first copy starts with boxes of a ninth of the image around its points."""
        d, k, subject = config.hidden_dim, config.num_classes, config.subject_logit
        self.classes = nnx.List(
            [ClassHead(d, k, subject=subject, rngs=rngs) for _ in range(copies)]
        )
        sizes = [INITIAL_SIZE if large else 0.0] + [0.0] * (copies - 1)
        self.boxes = nnx.List([BoxHead(d, initial_size=size, rngs=rngs) for size in sizes])


class References(NamedTuple):
    """Where the queries of a decoder layer stand."""

    seen: Float[Array, "b q r"]  # where they sample
    start: Float[Array, "b q r"]  # the same values: what the predicted boxes are relative to

    def move(
        self, deltas: Float[Array, "b q 4"], *, epsilon: float, look_forward_twice: bool
    ) -> "References":
        """Those of the next layer. No gradient comes back through what it sees; through the start
        of its boxes it does if `look_forward_twice`, as far as `deltas` (Zhang et al. 2022).
        """
        moved = refine(deltas, self.seen, epsilon=epsilon)
        seen = jax.lax.stop_gradient(moved)
        return References(seen, moved if look_forward_twice else seen)


class Decoded(NamedTuple):
    """What the layers say."""

    logits: Float[Array, "layers b q k+1"]
    boxes: Float[Array, "layers b q 4"]
    details: dict[str, Any]


Positions = Callable[[int, jax.Array, jax.Array], jax.Array]  # (layer, tokens, references) -> b q d


class RefiningDecoder(nnx.List):
    """The layers, in order."""

    def __init__(self, shape: LayerShape, *, num_layers: int, rngs: nnx.Rngs):
        layer = partial(DecoderLayer, shape, num_context=0, fusion=None, rngs=rngs)
        super().__init__([layer() for _ in range(num_layers)])

    def __call__(
        self,
        tokens: Float[Array, "b q d"],
        positions: Float[Array, "b q d"] | Positions,
        references: Float[Array, "b q r"],
        memory: Memory,
        heads: Heads,
        *,
        refines: bool = True,
        look_forward_twice: bool = False,
        epsilon: float,
        norm: LayerNorm | None = None,
        hidden: Bool[Array, "#b #q q"] | None = None,
        remat: str,
        **how: Any,
    ) -> Decoded:
        """Predictions of every layer, from tokens behind the `norm` where there is one (boxes move
        by what is before it). `references` are points or boxes; `epsilon` is that of their inverse
        sigmoid; `how`: `noise` and `implementation` of each layer.
        """
        at = References(references, references)
        logits, boxes, states, seen, details = [], [], [], [at.seen], []
        for i, layer in enumerate(self):
            run = partial(layer, spatial_shapes=memory.spatial_shapes, hidden=hidden, **how)
            points, *sizes = in_each_map(at.seen, memory.valid_ratios)
            position = positions(i, tokens, at.seen) if callable(positions) else positions
            with jax.named_scope("decoder"):
                tokens, looked_at = rematerialized(run, remat)(
                    tokens,
                    position,
                    points,
                    memory.tokens,
                    memory.padding,
                    boxes=sizes[0] if sizes else None,
                )
            with jax.named_scope("heads"):
                which = min(i, len(heads.boxes) - 1)
                box_head, exact = heads.boxes[which], tokens.astype(jnp.float32)
                state = exact if norm is None else norm(exact)
                logits.append(heads.classes[which](state))
                delta = box_head.deltas(state)
                boxes.append(refine(delta, at.start, epsilon=epsilon))
                if refines:
                    step = delta if norm is None else box_head.deltas(exact)
                    at = at.move(step, epsilon=epsilon, look_forward_twice=look_forward_twice)
            states.append(tokens)
            seen.append(at.seen)
            details.append(looked_at)
        return Decoded(
            jnp.stack(logits),
            jnp.stack(boxes),
            {
                "reference_points": references[..., :2],
                "references": seen,
                "valid_ratios": memory.valid_ratios,
                "memory": memory.tokens,
                "states": jnp.stack(states),
                "layers": details,
            },
        )


def box_waves(boxes: Float[Array, "b q 4"], memory: Memory) -> Float[Array, "b q e"]:
    """Waves of boxes on the padded canvas; e is twice the width of the memory."""
    padded = boxes * jnp.tile(memory.valid_ratios[:, :1], 2)
    return sine_of(padded, memory.tokens.shape[-1] // 2, order=YXWH)
