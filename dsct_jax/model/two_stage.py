"""Two-stage networks: CAER-Net-S (Lee et al. 2019), GLAMOR-Net (Le et al. 2021) and EMO-Net (Kosti
et al. 2017, 2020). Somebody else has found the person; a crop of the subject and the context are
encoded apart and fused late.
"""

import dataclasses
import itertools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsct_jax.batch import Known, Predictions, Targets
from dsct_jax.config import cannot_be_used, setting
from dsct_jax.crops import CropConfig
from dsct_jax.model.backbone import BACKBONES, ResNet
from dsct_jax.model.layers import (
    MLP,
    BatchNorm,
    BatchNormKind,
    Conv,
    DropoutNoise,
    Linear,
    dropout,
    torch_uniform,
    xavier_uniform,
)

SURE = 10.0  # logit of "a subject": the box was given


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoStageConfig(CropConfig):
    """The model section; the defaults are GLAMOR-Net's."""

    published: ClassVar = {
        "loss": {"class_loss": "cross_entropy", "weight_class": 1.0},
        "optimizer": {
            "kind": "keras",
            "learning_rate": 5e-4,
            "weight_decay": 0.0,
            "clip_norm": math.inf,
            "rules": ((r".*", 1.0),),
            "drop_at": 25 / 60,
            "drop_again_at": (40 / 60,),
            "lowest_rate": 1e-5,
        },
        "train": {"epochs": 60.0},
    }

    num_classes: int = setting(doc="k", shared=True, low=1)
    name: str = setting("two_stage", "CAER-Net-S, GLAMOR-Net, EMO-Net", choices=("two_stage",))
    encoder: str = setting(
        "five_conv", "of both streams: five_conv or a ResNet", choices=("five_conv", *BACKBONES)
    )
    widths: tuple[int, ...] = setting((32, 64, 128, 256, 256), "channels of five_conv", low=1)
    streams: str = setting("both", "which the classifier sees", choices=("face", "context", "both"))
    attention: str = setting(
        "gla",
        "over the context's cells. none: their mean; caer: by the context alone; gla: guided by "
        "the face, GLAMOR-Net",
        choices=("none", "caer", "gla"),
    )
    attention_sum: bool = setting(
        True, "of the weighted cells; False: their mean, a cell's share less (CAER-Net-S)"
    )
    vector_norm: bool = setting(False, "True: a batch norm of each stream before the fusion")
    fusion: str = setting(
        "adaptive",
        "adaptive: streams are weighted; concat: they are not; face_only, context_only: weighted, "
        "then the other is 0 (CAER-Net-S); linear: one layer and a batch norm (EMO-Net)",
        choices=("adaptive", "concat", "face_only", "context_only", "linear"),
    )
    hidden_dim: int = setting(128, "width of attention, fusion and classifier", low=1)
    ratings: bool = setting(False, "True: valence, arousal and dominance too")
    dropout: float = setting(0.5, "rate, in training", low=0, below=1, free=True)
    norm_epsilon: float = setting(1e-3, "of batch norms; PyTorch: 1e-5", above=0)
    norm_momentum: float = setting(
        0.01, "weight of a new batch in the statistics; PyTorch: 0.1", above=0, high=1, free=True
    )
    norm_variance: str = setting(
        "keras",
        "as the statistics keep it. torch: n / (n - 1) times the batch's; keras: that of maps only",
        choices=("torch", "keras"),
        free=True,
    )
    initial: str = setting(
        "glorot",
        "values of five_conv and of the layers after the encoders. glorot: Keras', biases 0",
        choices=("glorot", "torch"),
        free=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streams != "both" and self.fusion not in ("adaptive", "concat"):
            raise cannot_be_used("model.fusion", self.fusion, "adaptive or concat for one stream")
        if self.attention == "gla" and self.fusion == "linear":
            raise cannot_be_used("model.attention", "gla", "none or caer with fusion='linear'")

    @property
    def norm(self) -> BatchNormKind:
        """Of every batch norm."""
        unbiased = True, self.norm_variance == "torch"
        return BatchNormKind(self.norm_epsilon, self.norm_momentum, unbiased)

    @property
    def channels(self) -> int:
        """Of the last map of an encoder."""
        return (BACKBONES[self.encoder].channels if self.has_resnet else self.widths)[-1]

    @property
    def glorot(self) -> bool:
        """Whether values start as Keras'."""
        return self.initial == "glorot"

    @property
    def has_resnet(self) -> bool:
        """Whether the encoders are ResNets."""
        return self.encoder != "five_conv"


def _linear(d_in: int, d_out: int, config: TwoStageConfig, rngs: nnx.Rngs) -> Linear:
    if config.glorot:
        return Linear(d_in, d_out, rngs=rngs)
    start = torch_uniform(d_in)
    return Linear(d_in, d_out, kernel_init=start, bias_init=start, rngs=rngs)


class ConvBlock(nnx.Module):
    """3x3 convolutions with bias, each with batch norm and ReLU; max pooling after all but `last`
    of them.
    """

    def __init__(self, *widths: int, pooled: int, config: TwoStageConfig, rngs: nnx.Rngs):
        convs, norms, self.pooled = [], [], pooled
        for a, b in itertools.pairwise(widths):
            torch = None if config.glorot else torch_uniform(9 * a)
            start: dict[str, Any] = {"kernel_init": torch or xavier_uniform, "bias_init": torch}
            convs.append(Conv(a, b, 3, use_bias=True, **start, rngs=rngs))
            norms.append(BatchNorm(b, config.norm))
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)

    def __call__(self, x: Float[Array, "b h w c"]) -> list[jax.Array]:
        """What each gives."""
        features = []
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = jax.nn.relu(norm(conv(x)))
            if i < self.pooled:
                x = jax.lax.reduce_window(
                    x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
                )
            features.append(x)
        return features


class GuidedAttention(nnx.Module):
    """Global-local attention: how much each cell matters, given the face (GLAMOR-Net)."""

    def __init__(self, config: TwoStageConfig, rngs: nnx.Rngs):
        d = config.hidden_dim
        self.fc1 = _linear(2 * config.channels, d, config, rngs)
        self.norm = BatchNorm(d, config.norm)
        self.fc2 = _linear(d, 1, config, rngs)

    def __call__(
        self, face: Float[Array, "b d"], cells: Float[Array, "b s d"]
    ) -> Float[Array, "b s"]:
        pairs = jnp.concatenate([jnp.broadcast_to(face[:, None], cells.shape), cells], -1)
        # a ReLU on both sides of the norm, as in the authors' code
        return self.fc2(jax.nn.relu(self.norm(jax.nn.relu(self.fc1(pairs)))))[..., 0]


class TwoStage(nnx.Module):
    """(context, subject) -> what each person feels."""

    def __init__(self, config: TwoStageConfig, *, rngs: nnx.Rngs):
        self.config, d, hidden = config, config.channels, config.hidden_dim
        face, context = (config.streams in (stream, "both") for stream in ("face", "context"))
        guided = context and config.attention == "gla"
        self.face = self._encoder(rngs) if face or guided else None
        self.context = self._encoder(rngs) if context else None
        attention: Any = GuidedAttention(config, rngs) if guided else None
        if context and config.attention == "caer":
            attention = ConvBlock(d, hidden, 1, pooled=0, config=config, rngs=rngs)
        self.attention = attention
        normed, weighted = config.vector_norm, face and context and self._weighs
        self.face_norm = BatchNorm(d, config.norm) if face and normed else None
        self.context_norm = BatchNorm(d, config.norm) if context and normed else None
        self.face_score = self._score(rngs) if weighted else None
        self.context_score = self._score(rngs) if weighted else None
        self.hidden = _linear((face + context) * d, hidden, config, rngs)
        self.hidden_norm = BatchNorm(hidden, config.norm) if config.fusion == "linear" else None
        self.class_head = _linear(hidden, config.num_classes, config, rngs)
        self.rating_head = _linear(hidden, 3, config, rngs) if config.ratings else None

    @property
    def _weighs(self) -> bool:
        return self.config.fusion in ("adaptive", "face_only", "context_only")

    def _encoder(self, rngs: nnx.Rngs) -> Any:
        config = self.config
        if config.has_resnet:
            return ResNet(BACKBONES[config.encoder], norm=config.norm, rngs=rngs)
        widths = 3, *config.widths
        return ConvBlock(*widths, pooled=len(config.widths) - 1, config=config, rngs=rngs)

    def _score(self, rngs: nnx.Rngs) -> Any:
        widths, glorot = (self.config.channels, self.config.hidden_dim, 1), self.config.glorot
        start = nnx.initializers.zeros if glorot else None
        return MLP(*widths, xavier=glorot, bias_init=start, rngs=rngs)

    def __call__(
        self,
        images: Float[Array, "b c c 3"],
        subjects: Float[Array, "b s s 3"],
        *,
        people: Targets | None = None,
        noise: DropoutNoise | None = None,
        return_details: bool = False,
        implementation: str | None = None,
    ) -> Predictions:
        """Normalized context and subject -> predictions of one layer and one query: logits of the
        classes, that of "a subject", which is always sure, and the box of `people` (without them
        the whole image).

        `noise` means training: it turns dropout on, and batch norms take this batch's statistics.
        `implementation` is not read. With `return_details` the predictions carry maps, vectors,
        attention [b h w] and fusion_weights [b 2] (face, context).
        """
        del implementation
        for _, module in nnx.iter_graph(self):
            if isinstance(module, BatchNorm):
                module.training = noise is not None
        details: dict[str, Any] = {}
        vectors = self._vectors(images, subjects, details)
        x = self.hidden(self._fuse(vectors, details))
        if self.hidden_norm is not None:
            x = self.hidden_norm(x)
        details["hidden"] = x = jax.nn.relu(x)
        x = dropout(x, self.config.dropout, noise)
        b = x.shape[0]
        sure = jnp.full_like(x[:, :1], SURE)
        logits = jnp.concatenate([self.class_head(x), sure], -1)[None, :, None]
        boxes = jnp.broadcast_to(jnp.array([0.5, 0.5, 1.0, 1.0]), (b, 1, 4))
        return Predictions(
            logits,
            (boxes if people is None else people.boxes[:, :1])[None],
            details if return_details else None,
            assignment=Known(jnp.zeros((b, 1), jnp.int32)),
            ratings=None if self.rating_head is None else self.rating_head(x),
        )

    def _vectors(
        self, images: jax.Array, subjects: jax.Array, details: dict[str, Any]
    ) -> dict[str, Float[Array, "b d"]]:
        """Of the face and the context, as far as the classifier sees them."""
        vectors = {}
        if self.face is not None:
            details["face_features"] = features = self.face(subjects)
            vectors["face"] = details["face"] = features[-1].mean((1, 2))
        if self.context is not None:
            details["context_features"] = features = self.context(images)
            vectors["context"] = self._attend(features[-1], vectors.get("face"), details)
        for name, norm in (("face", self.face_norm), ("context", self.context_norm)):
            if norm is not None:
                vectors[name] = norm(vectors[name])
        return vectors

    def _attend(
        self, cells: Float[Array, "b h w d"], face: Any, details: dict[str, Any]
    ) -> Float[Array, "b d"]:
        b, h, w, d = cells.shape
        if self.attention is None:
            scores = jnp.zeros((b, h * w))
        elif isinstance(self.attention, GuidedAttention):
            scores = self.attention(face, cells.reshape(b, h * w, d))
        else:
            scores = self.attention(cells)[-1].reshape(b, h * w)
        attention = jax.nn.softmax(scores).reshape(b, h, w, 1)
        details |= {"attention_scores": scores, "attention": attention[..., 0]}
        weighted = cells * attention
        total = self.config.attention_sum or self.attention is None
        details["context"] = weighted.sum((1, 2)) if total else weighted.mean((1, 2))
        return details["context"]

    def _fuse(self, vectors: dict[str, jax.Array], details: dict[str, Any]) -> Float[Array, "b d2"]:
        """What the classifier sees: of both streams (face, context), EMO-Net: (context, body)."""
        fusion, streams = self.config.fusion, self.config.streams
        details |= {"face_vector": vectors.get("face"), "context_vector": vectors.get("context")}
        if streams != "both":
            return vectors[streams]
        face, context = vectors["face"], vectors["context"]
        if fusion == "linear":
            return jnp.concatenate([context, face], -1)
        if self.face_score is not None and self.context_score is not None:
            scores = jnp.concatenate([self.face_score(face), self.context_score(context)], -1)
            weights = jax.nn.softmax(scores)
            details |= {"fusion_scores": scores, "fusion_weights": weights}
            face, context = face * weights[:, :1], context * weights[:, 1:]
        if fusion == "face_only":
            context = jnp.zeros_like(context)
        elif fusion == "context_only":
            face = jnp.zeros_like(face)
        return jnp.concatenate([face, context], -1)
