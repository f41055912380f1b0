"""The sections of a configuration that describe training: fields, defaults, meanings, checks."""

import dataclasses
from collections.abc import Sequence

from dsct_jax.config import cannot_be_used, check_settings, setting
from dsct_jax.errors import UserError
from dsct_jax.parallel import FSDP

MATCHERS = ("scipy", "device")
GIVEN_LOSSES = ("cross_entropy", "squared")  # of networks whose people are given


@dataclasses.dataclass(frozen=True)
class MatcherConfig:
    """Weights of the three costs (the paper's theta; the released code's set_cost_*), and where the
    assignment is solved.
    """

    cost_class: float = setting(2.0, "theta_cls", low=0)
    cost_bbox: float = setting(5.0, "theta_box, L1", low=0)
    cost_giou: float = setting(2.0, "generalized IoU", low=0)
    implementation: str = setting(
        "scipy",
        "scipy: on the host, between the two halves of a step; device: optax, the step is one "
        "program",
        choices=MATCHERS,
    )

    def __post_init__(self) -> None:
        check_settings(self, "matcher")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and forms of the loss terms."""

    weight_class: float = setting(5.0, "lambda_cls", low=0)
    weight_bbox: float = setting(5.0, "lambda_box, L1", low=0)
    weight_giou: float = setting(2.0, "generalized IoU", low=0)
    focal_alpha: float = setting(0.25, "weight of the positives", low=0, high=1)
    focal_gamma: float = setting(2.0, "how much easy examples count less", low=0)
    focal_normalization: str = setting(
        "released",
        "released: sum over queries and classes / boxes; paper: that / classes (a mean over "
        "classes)",
        choices=("released", "paper"),
    )
    class_weights: tuple[float, ...] = setting(
        (), "one weight per class against imbalance; () = none", low=0
    )
    logit_adjustment: float = setting(
        0.0,
        "class_loss=softmax: times the log of a class's share of the training people, added to its "
        "logit in training only, so that rare emotions are answered too (Menon et al. 2021)",
        low=0,
    )
    class_shares: tuple[float, ...] = setting(
        (), "these shares; () = counted from the training split", low=0, high=1
    )
    class_loss: str = setting(
        "focal",
        'focal: paper; softmax: cross-entropy of the class + focal "a subject", from scratch and '
        'multi-class only; no_object: DETR\'s mean cross-entropy of the classes and "nobody", '
        "multi-class only; for two-stage networks cross_entropy, a mean over people, or squared: "
        "EMO-Net's weighted sum of squared errors of scores",
        choices=("focal", "softmax", "no_object", *GIVEN_LOSSES),
    )
    squared_weights: str = setting(
        "dynamic",
        "of the classes in class_loss='squared'. dynamic: 1 / ln(1.2 + people of the batch); mean: "
        "1 / classes; static: class_weights",
        choices=("dynamic", "mean", "static"),
    )
    weight_ratings: float = setting(0.5, "of valence, arousal and dominance (EMO-Net)", low=0)
    ratings_loss: str = setting(
        "smooth_l1",
        "a sum over people, of ratings from 0 to 10; l2: squares, but 0 below an error of 1",
        choices=("smooth_l1", "l2"),
    )
    no_object_weight: float = setting(
        0.1, 'of "nobody" in class_loss="no_object"; people count 1', above=0
    )
    giou_epsilon: float = setting(
        0.0, "added to both denominators of IoU and GIoU (DAB, DN, DINO, detrex: 1e-6)", low=0
    )
    label_smoothing: float = setting(
        0.0, "share of the label given to the other classes, at matched queries", low=0, below=1
    )

    def __post_init__(self) -> None:
        # hashable, so that the configuration can be a static argument
        object.__setattr__(self, "class_weights", tuple(self.class_weights))
        object.__setattr__(self, "class_shares", tuple(self.class_shares))
        check_settings(self, "loss")
        if self.logit_adjustment and self.class_loss != "softmax":
            wanted = "0 unless config.loss.class_loss='softmax'"
            raise cannot_be_used("loss.logit_adjustment", self.logit_adjustment, wanted)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The rule of the update, its schedule and the rules over parameter paths."""

    kind: str = setting(
        "adamw",
        "adamw; adam: the decay inside the gradient; sgd, nesterov: PyTorch's momentum; keras: "
        "momentum that holds the learning rate, so that a drop acts as the velocity decays",
        choices=("adamw", "adam", "sgd", "nesterov", "keras"),
    )
    momentum: float = setting(0.9, "of sgd, nesterov and keras", low=0, below=1)
    learning_rate: float = setting(2e-4, "of the parameters with multiplier 1", above=0)
    weight_decay: float = setting(1e-4, "on every trained parameter, as released", low=0)
    clip_norm: float = setting(0.1, "global gradient norm; inf = off", above=0, finite=False)
    schedule: str = setting(
        "step", "step: x0.1 at every drop; cosine: to zero", choices=("step", "cosine")
    )
    drop_at: float = setting(
        0.8, 'share of the run after which "step" drops (epoch 40 of 50)', low=0, high=1
    )
    drop_again_at: Sequence[float] = setting((), "further such shares", low=0, high=1)
    lowest_rate: float = setting(0.0, 'where drops of "step" end', low=0)
    warmup_steps: int = setting(0, "linear from 0", low=0)
    rules: Sequence[tuple[str, float]] = setting(
        (
            (r"backbone/(stem|layer1)/.*", 0.0),
            (r"backbone/layer[234]/.*", 0.1),
            (r"(.*/)?(sampling_offsets|reference_points)/.*", 0.1),
            (r"(?!backbone/|(.*/)?(sampling_offsets|reference_points)/).*", 1.0),
        ),
        "(regex over whole parameter paths, learning-rate multiplier; 0 = frozen): exactly one "
        "must match each parameter",
        low=0,
    )

    def __post_init__(self) -> None:
        check_settings(self, "optimizer")


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step is carried out; TrainConfig explains each field."""

    accumulate: int = setting(1, low=1)
    ema_decay: float = setting(0.0, low=0, below=1)
    skip_nonfinite: bool = setting(True)
    shard_rules: Sequence[tuple[str, str]] = setting(())
    shard_min_size: int = setting(2**14, low=0)

    def __post_init__(self) -> None:
        check_settings(self, "train")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long a run is and what it does on the way."""

    batch_size: int = setting(4, "global: over all devices and hosts", low=1)
    eval_batch_size: int = setting(4, "the same for validation", low=1)
    epochs: float = setting(50.0, "passes over the training images", above=0)
    steps: int = setting(0, "0 = from epochs; otherwise it wins", low=0)
    eval_every: float = setting(1.0, "epochs", above=0)
    checkpoint_every: float = setting(1.0, "epochs", above=0)
    keep_checkpoints: int = setting(3, "how many, besides the best", low=1)
    log_every: int = setting(50, "steps", low=1)
    best_metric: str = setting(
        "", "of a validation, kept in a checkpoint of its own; '' = mAP (multi_label) or accuracy"
    )
    early_stopping: int = setting(
        0, "validations without a better one that end the run; 0 = off", low=0
    )
    wandb: str = setting(
        "",
        "Weights & Biases project that gets the numbers too (needs the package wandb); '' = none",
    )
    accumulate: int = setting(
        1,
        "parts that each device's share of a batch is cut into, one after another: the same step "
        "with less memory",
        low=1,
    )
    ema_decay: float = setting(
        0.0,
        "moving average of the parameters, used by validation, prediction and exports; 0 = off, "
        "such as 0.9998",
        low=0,
        below=1,
    )
    fsdp: bool = setting(
        False,
        "True: parameters, their average and the optimizer's state are spread over the devices "
        "instead of copied",
    )
    max_skipped: int = setting(
        20,
        "steps in a row whose loss or gradient is not finite and which are skipped before the run "
        "stops",
        low=0,
    )

    def __post_init__(self) -> None:
        check_settings(self, "train")

    @property
    def step_config(self) -> StepConfig:
        """The part that a step needs to know."""
        return StepConfig(
            accumulate=self.accumulate,
            ema_decay=self.ema_decay,
            shard_rules=FSDP if self.fsdp else (),
        )

    def require_divisible(self, devices: int) -> None:
        """Raises UserError unless the global batch sizes divide by the number of devices."""
        if self.batch_size % (devices * self.accumulate) and self.accumulate > 1:
            parts = f"{devices} devices x config.train.accumulate={self.accumulate}"
            raise UserError(
                f"config.train.batch_size={self.batch_size} cannot be shared by {parts}: set it "
                "to a multiple of their product"
            )
        for field in ("batch_size", "eval_batch_size"):
            if getattr(self, field) % devices:
                raise UserError(
                    f"config.train.{field}={getattr(self, field)} cannot be shared by {devices} "
                    f"devices: set it to a multiple of {devices}"
                )
