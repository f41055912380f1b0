"""Every field of a run, once: default, unit, meaning, source. Another configuration is a difference
from this one.

The defaults are the paper's: EMOTIC, ResNet-50, 4 subject and 300 context queries (paper = "Two in
One Go", ACM MM 2024; "released" = the authors' code). A section becomes one frozen dataclass in
train.py, so a misspelt key is an error there.
"""

from ml_collections import ConfigDict

EMOTIC_CLASSES = (
    "Affection", "Anger", "Annoyance", "Anticipation", "Aversion", "Confidence", "Disapproval", "Disconnection", "Disquietment",
    "Doubt/Confusion", "Embarrassment", "Engagement", "Esteem", "Excitement", "Fatigue", "Fear", "Happiness", "Pain", "Peace", "Pleasure",
    "Sadness", "Sensitivity", "Suffering", "Surprise", "Sympathy", "Yearning",
)  # fmt: skip
CAER_S_CLASSES = ("Anger", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise")


def get_config() -> ConfigDict:
    """The complete configuration with the paper's EMOTIC values."""
    config = ConfigDict()
    config.name = "base"
    config.seed = 0
    # weights to start from: .pth or .safetensors of others, or a run of ours (docs/weights.md)
    config.init_from = ""
    config.class_names = EMOTIC_CLASSES
    # True: a person has any number of emotions (EMOTIC, mAP); False: exactly one (CAER-S, accuracy)
    config.multi_label = True

    model = config.model = ConfigDict()
    model.backbone = "resnet50"  # a name of dsct_jax.model.backbone.BACKBONES
    # frozen_batch: statistics and scale fixed, for pretrained weights; group: trainable, for
    # training from scratch
    model.norm = "frozen_batch"
    model.hidden_dim = 256  # d
    model.num_heads = 8  # n
    model.num_points = 4  # p, sampling points a head and level
    model.num_levels = 4  # l: C3, C4, C5 and one stride-2 convolution of C5
    model.feedforward_dim = 1024
    model.num_encoder_layers = 6
    model.num_decoder_layers = 6
    model.dropout = 0.1
    model.num_subject_queries = 4  # N (Table 5: 4 for EMOTIC, 9 for CAER-S)
    model.num_context_queries = 300  # M, taken from Deformable DETR; 0 = the Table 6 baseline
    model.num_spatial_neighbors = 100  # K_sp, 0 = off (Figure 11)
    model.num_semantic_neighbors = 50  # K_sm, 0 = off (Figure 11)
    # paper: Eq. 8, one softmax over both selections; released: two softmaxes and a subject-subject
    # term
    model.fusion = "paper"
    model.semantic_selection = "smallest"  # smallest: the paper's text; largest: the released code
    model.reweighting = "semantic"  # semantic | equal | spatial | attentive (Table 7)
    # True: each layer samples inside the box of the one before and refines it (Zhu et al. 2020)
    model.box_refinement = False
    # float32 | bfloat16; parameters, sampling locations, softmax, fusion, heads and losses are
    # float32 in any case
    model.compute_dtype = "float32"
    # What training computes twice to save memory. none; light: in encoder and decoder all but
    # matrix products, sampled attention and dropout's bits; layers: the matrix products too; all:
    # residual blocks too. docs/training_step.md has what each saves and costs.
    model.remat = "light"
    # numbers from 0 of the decoder layers that fuse (Table 8), () = all of them; late fusion = the
    # last only
    model.fusion_layers = ()

    matcher = config.matcher = ConfigDict()
    matcher.cost_class = 2.0  # theta_cls
    matcher.cost_bbox = 5.0  # theta_box, L1
    matcher.cost_giou = 2.0
    # scipy: on the host, between the two halves of a step; device: optax, the step is one program
    matcher.implementation = "scipy"

    loss = config.loss = ConfigDict()
    loss.weight_class = 5.0  # lambda_cls
    loss.weight_bbox = 5.0  # lambda_box, L1
    loss.weight_giou = 2.0
    loss.focal_alpha = 0.25
    loss.focal_gamma = 2.0
    # released: sum over queries and classes / boxes; paper: that / classes (a mean over classes)
    loss.focal_normalization = "released"
    loss.class_weights = ()  # one weight a class against imbalance; () = none
    # focal: paper; softmax: cross-entropy of the class + focal "a subject", from scratch and
    # multi-class only
    loss.class_loss = "focal"
    loss.label_smoothing = 0.0  # share of the label given to the other classes, at matched queries

    optimizer = config.optimizer = ConfigDict()
    optimizer.learning_rate = 2e-4
    optimizer.weight_decay = 1e-4  # on every trained parameter, as released
    optimizer.clip_norm = 0.1  # global gradient norm
    optimizer.schedule = "step"  # step: x0.1 once; cosine: to zero
    optimizer.drop_at = 0.8  # share of the run after which "step" drops (epoch 40 of 50)
    optimizer.warmup_steps = 0  # linear from 0
    # (regex over whole parameter paths, learning-rate multiplier; 0 = frozen): exactly one must
    # match each parameter
    optimizer.rules = (
        (r"backbone/(stem|layer1)/.*", 0.0),
        (r"backbone/layer[234]/.*", 0.1),
        (r"(.*/)?(sampling_offsets|reference_points)/.*", 0.1),
        (r"(?!backbone/|(.*/)?(sampling_offsets|reference_points)/).*", 1.0),
    )

    data = config.data = ConfigDict()
    # coco | caer_s | ncaer_s | emotic | scenes | prepared (data_dir: the --output of
    # data.tools.prepare)
    data.source = "coco"
    # the task named with every result; auto: as the files tell, or a name of data.config.PROTOCOLS
    # (docs/datasets.md)
    data.protocol = "auto"
    data.data_dir = ""  # root of the images; for scenes unused
    # of each split FILE, ROOT:FILE or several with commas, below data_dir (scenes: number of
    # images; ncaer_s: folder)
    data.train = "train.json"
    data.val = "val.json"
    data.test = "test.json"
    # ids: category_id is a class number, or a list of them; bits: the 26-bit masks of the EMOTIC
    # head-box json
    data.label_format = "ids"
    # emotic only. head: the paper's task, of Torch7 files; body: Annotations.mat, .csv or Torch7
    data.person_box = "head"
    # emotic only. True: leave out people whose valence, arousal or dominance is missing, as much
    # code does
    data.drop_unrated = False
    data.max_targets = 16  # t: people kept an image; more is an error that names the image
    data.short_sides = (
        480,
        512,
        544,
        576,
        608,
        640,
        672,
        704,
        736,
        768,
        800,
    )  # training: one is drawn (DETR)
    data.max_long_side = 1333
    data.crop_resize = (400, 500, 600)  # short side before the random crop
    data.crop_size = (384, 600)  # smallest and largest side of the random crop
    data.crop_probability = 0.5
    data.flip_probability = 0.5
    # strength of random brightness, contrast and saturation, 0..1; not in the paper, for training
    # from scratch
    data.color_jitter = 0.0
    # share of the training images shown without colour; not in the paper, for training from scratch
    data.grayscale_probability = 0.0
    data.eval_short_side = 800
    data.buckets = (
        (800, 1344),
        (1344, 800),
        (1088, 1088),
    )  # (height, width) of the padded canvases; one compiled program each
    data.num_workers = 2  # processes; 0 = in this one
    data.cache = False  # True: keep decoded images in memory (in each worker), for small data sets
    # True: a file that cannot be read is counted and left out instead of stopping the run
    data.skip_corrupt = False

    train = config.train = ConfigDict()
    train.batch_size = 4  # global: over all devices and hosts
    train.eval_batch_size = 4
    train.epochs = 50
    train.steps = 0  # 0 = from epochs; otherwise it wins
    train.eval_every = 1.0  # epochs
    train.checkpoint_every = 1.0  # epochs
    train.keep_checkpoints = 3
    train.log_every = 50  # steps
    train.best_metric = (
        ""  # of a validation, kept in a checkpoint of its own; "" = mAP (multi_label) or accuracy
    )
    train.early_stopping = 0  # validations without a better one that end the run; 0 = off
    # Weights & Biases project that gets the numbers too (needs the package wandb); "" = none
    train.wandb = ""
    # parts that each device's share of a batch is cut into, one after another: the same step with
    # less memory
    train.accumulate = 1
    # moving average of the parameters, used by validation, prediction and exports; 0 = off, such as
    # 0.9998
    train.ema_decay = 0.0
    # True: parameters, their average and the optimizer's state are spread over the devices instead
    # of copied
    train.fsdp = False
    # steps in a row whose loss or gradient is not finite and which are skipped before the run stops
    train.max_skipped = 20
    return config
