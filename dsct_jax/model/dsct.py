"""DSCT: one network from an image to the boxes and emotions of its people (paper Fig. 3)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsct_jax.batch import Predictions, Targets
from dsct_jax.config import cannot_be_used, setting
from dsct_jax.model.attention import LayerShape
from dsct_jax.model.backbone import BACKBONES, ResNet
from dsct_jax.model.decoder import Decoder, FusionConfig, Queries
from dsct_jax.model.encoder import Encoder, Memory
from dsct_jax.model.family import TransformerConfig
from dsct_jax.model.heads import BoxHead, ClassHead
from dsct_jax.model.layers import DropoutNoise, InputProjection, Linear, standard_normal
from dsct_jax.model.position import resize_mask, sine_position, valid_ratio


@dataclasses.dataclass(frozen=True)
class DSCTConfig(TransformerConfig):
    """The model section of a configuration."""

    name: str = setting("dsct", "DSCT", choices=("dsct",))
    feedforward_dim: int = setting(1024, "width inside a feed-forward block", low=1)
    num_points: int = setting(4, "p, sampling points per head and level", low=1)
    num_levels: int = setting(4, "l: C3, C4, C5 and one stride-2 convolution of C5", low=3)
    num_subject_queries: int = setting(4, "N (Table 5: 4 for EMOTIC, 9 for CAER-S)", low=1)
    num_context_queries: int = setting(300, "M, as Deformable DETR; 0 = Table 6's baseline", low=0)
    num_spatial_neighbors: int = setting(100, "K_sp, 0 = off (Figure 11)", low=0)
    num_semantic_neighbors: int = setting(50, "K_sm, 0 = off (Figure 11)", low=0)
    fusion: str = setting(
        "paper",
        "paper: Eq. 8, one softmax over both selections; released: two, and a subject-subject term",
        choices=("paper", "released"),
    )
    semantic_selection: str = setting(
        "smallest", "the paper's text; largest: the released code", choices=("smallest", "largest")
    )
    reweighting: str = setting(
        "semantic", "Table 7", choices=("semantic", "equal", "spatial", "attentive")
    )
    fusion_layers: tuple[int, ...] = setting(
        (), "decoder layers that fuse, from 0 (Table 8); () = all, late fusion = the last", low=0
    )
    box_refinement: bool = setting(
        False,
        "each layer samples inside the box of the one before and refines it (Zhu et al. 2020)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        last, enough = self.num_decoder_layers - 1, "at most config.model.num_context_queries"
        spatial, semantic = self.num_spatial_neighbors, self.num_semantic_neighbors
        most = self.num_context_queries or max(spatial, semantic)
        enough += f" ({most})"
        for field, fits, wanted in (
            ("num_spatial_neighbors", spatial <= most, enough),
            ("num_semantic_neighbors", semantic <= most, enough),
            ("fusion_layers", max(self.fusion_layers, default=0) <= last, f"of layers 0 to {last}"),
        ):
            if not fits:
                raise cannot_be_used(f"model.{field}", getattr(self, field), wanted)

    def fusion_of_layer(self, layer: int) -> FusionConfig | None:
        """How decoder layer `layer` fuses, None where it does not."""
        chosen = not self.fusion_layers or layer in self.fusion_layers
        neighbors = self.num_spatial_neighbors + self.num_semantic_neighbors
        if not (chosen and neighbors and self.num_context_queries):
            return None
        numbers = self.num_spatial_neighbors, self.num_semantic_neighbors
        return FusionConfig(self.fusion, self.semantic_selection, *numbers, self.reweighting)


class DSCT(nnx.Module):
    """Decoupled Subject-Context Transformer."""

    def __init__(self, config: DSCTConfig, *, rngs: nnx.Rngs):
        d = config.hidden_dim
        self.config = config
        resnet = BACKBONES[config.backbone]
        self.backbone = ResNet(resnet, norm=config.norm, rngs=rngs)
        widths = [*resnet.channels, resnet.channels[-1], *[d] * (config.num_levels - 4)]
        self.input_proj = nnx.List(
            [
                InputProjection(widths[i], d, strided=i >= 3, rngs=rngs)
                for i in range(config.num_levels)
            ]
        )
        self.level_embed = nnx.Param(standard_normal(rngs.params(), (config.num_levels, d)))
        numbers = config.num_heads, config.num_levels, config.num_points
        shape = LayerShape(d, *numbers, config.feedforward_dim, config.dropout)
        self.encoder = Encoder(shape, num_layers=config.num_encoder_layers, rngs=rngs)
        m, q = config.num_context_queries, config.num_subject_queries
        if m:  # no array without elements: checkpoints cannot hold one
            self.context_queries = nnx.Param(standard_normal(rngs.params(), (m, 2 * d)))
        self.subject_queries = nnx.Param(standard_normal(rngs.params(), (q, 2 * d)))
        self.reference_points = Linear(d, 2, rngs=rngs)
        fusions = [config.fusion_of_layer(i) for i in range(config.num_decoder_layers)]
        self.decoder = Decoder(shape, num_context=m, fusions=fusions, rngs=rngs)
        self.class_head = ClassHead(d, config.num_classes, subject=True, rngs=rngs)
        self.box_head = BoxHead(d, refines=config.box_refinement, rngs=rngs)

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        padding_mask: Bool[Array, "b h w"],
        *,
        people: Targets | None = None,
        noise: DropoutNoise | None = None,
        return_details: bool = False,
        implementation: str | None = None,
    ) -> Predictions:
        """Normalized images and their padding (True) -> predictions of every decoder layer.

        `noise` turns dropout on, which means training; `people` is not read; `implementation` names
        one of deformable attention's. With `return_details` the predictions carry reference points,
        memory and, of each decoder layer, everything it looked at.
        """
        del people
        remat = "none" if return_details else self.config.remat
        how: dict[str, Any] = {"noise": noise, "implementation": implementation, "remat": remat}
        # The scopes are what a profile calls the parts.
        with jax.named_scope("backbone"):
            features = self.features(images, remat=remat)
        with jax.named_scope("encoder"):
            memory = self.encode(features, padding_mask, **how)
        queries = self.queries(images.shape[0])
        states, boxes, layers = self.decoder(queries, memory, self.box_head, **how)
        with jax.named_scope("heads"):
            subjects = states[:, :, self.config.num_context_queries :]
            logits = self.class_head(subjects.astype(jnp.float32))
        if not return_details:
            return Predictions(logits, boxes)
        details = {
            "reference_points": queries.reference_points,
            "valid_ratios": memory.valid_ratios,
            "memory": memory.tokens,
            "features": features,
            "states": states,
            "layers": layers,
        }
        return Predictions(logits, boxes, details)

    def features(
        self, images: Float[Array, "b h w 3"], *, remat: str = "none"
    ) -> list[Float[Array, "b _ _ d"]]:
        """Normalized images -> one map per level, in the type that the model computes in."""
        return self.project(self.backbone(images.astype(self.config.compute_dtype), remat=remat))

    def encode(
        self,
        features: list[Float[Array, "b _ _ d"]],
        padding_mask: Bool[Array, "b h w"],
        *,
        noise: DropoutNoise | None = None,
        implementation: str | None = None,
        remat: str = "none",
    ) -> Memory:
        """One map per level -> what the decoder reads."""
        how: dict[str, Any] = {"noise": noise, "implementation": implementation, "remat": remat}
        return self.encoder(*self.flatten(features, padding_mask), **how)

    def project(self, features: list[jax.Array]) -> list[Float[Array, "b _ _ d"]]:
        """C3, C4, C5 -> one map per level; those beyond C5 come from C5, then from each other."""
        levels = [project(x) for project, x in zip(self.input_proj, features, strict=False)]
        source = features[-1]
        for project in self.input_proj[len(features) :]:
            source = project(source)
            levels.append(source)
        return levels

    def flatten(
        self, features: list[Float[Array, "b _ _ d"]], padding_mask: Bool[Array, "b h w"]
    ) -> tuple[Memory, Float[Array, "b s d"]]:
        """Maps -> their tokens, and the positions of these."""
        tokens, positions, paddings, ratios = [], [], [], []
        for level, x in enumerate(features):
            b, h, w, d = x.shape
            mask = resize_mask(padding_mask, h, w)
            position = sine_position(mask, d) + self.level_embed[level].reshape(1, 1, 1, d)
            tokens.append(x.reshape(b, h * w, d))
            positions.append(position.astype(x.dtype).reshape(b, h * w, d))
            paddings.append(mask.reshape(b, h * w))
            ratios.append(valid_ratio(mask))
        shapes = tuple((x.shape[1], x.shape[2]) for x in features)
        joined, padding = jnp.concatenate(tokens, 1), jnp.concatenate(paddings, 1)
        memory = Memory(joined, padding, shapes, jnp.stack(ratios, 1))
        return memory, jnp.concatenate(positions, 1)

    def queries(self, b: Any) -> Queries:
        """Context and subject queries for `b` images: an int, or a symbolic size (jax.export)."""
        context = [self.context_queries[...]] if self.config.num_context_queries else []
        embedding = jnp.concatenate([*context, self.subject_queries[...]])
        positions, tokens = jnp.split(jnp.broadcast_to(embedding, (b, *embedding.shape)), 2, -1)
        points = jax.nn.sigmoid(self.reference_points(positions))
        dtype = self.config.compute_dtype
        return Queries(tokens.astype(dtype), positions.astype(dtype), points)
