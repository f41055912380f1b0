"""The command lines of `dsct`, --help included. They lie apart from the commands, so that --help
and a mistyped flag are answered before jax is imported.
"""

import argparse

from dsct_jax.cli import Parser
from dsct_jax.config import (
    BATCH_SIZE,
    BOXES,
    MAX_MEGAPIXELS,
    NMS_IOU,
    RESAMPLES,
    expanded_path,
)

CHECKPOINT = "run directory, .safetensors, hf:ORG/NAME[@REV], or released .pth (with --config)"
CONFIG = "configuration (.py or .json) that describes the weights; needed for .pth only"
FIGURES = ("predictions", "activation", "sampling", "context", "compare", "embeddings", "losses")
FORMATS = ("stablehlo", "safetensors", "torch", "onnx")
COMMANDS = {
    "predict": "people and their emotions in images, folders, videos or a camera",
    "predict_many": "an archive of images as Parquet, by many processes, resumable",
    "serve": "a page and an HTTP door for a model, on this machine",
    "evaluate": "every metric of a predictions_<split>.npz, without a model",
    "report": "curves and tables of a run",
    "visualize": "the paper's figures, drawn from a checkpoint",
    "export": "a trained model as StableHLO, safetensors, .pth or ONNX",
    "convert": "third-party weights as a .safetensors file of this project",
    "model_card": "what others should know about a trained model, as Markdown",
    "publish": "a trained model and its card on the Hugging Face hub",
}
SEE_ALSO = (
    "To train, and to import, check, show or split annotations: train.py and "
    "python -m data COMMAND, in a checkout of the repository."
)


def add_checkpoint(parser: Parser, *, required: bool = True) -> None:
    """--checkpoint and --config, which `flags.load_model` reads."""
    parser.add_argument("--checkpoint", type=expanded_path, required=required, help=CHECKPOINT)
    parser.add_argument("--config", type=expanded_path, help=CONFIG)


def add_selection(parser: Parser) -> None:
    """--threshold, --min-confidence and --nms, which `flags.selection` reads."""
    add = parser.add_argument
    threshold = "multi-label: probability that makes a class a label; default: as fitted, or 0.5"
    add("--threshold", type=float, help=threshold)
    confidence = "below which a query is nobody; default: as fitted on validation, or 0.3"
    add("--min-confidence", type=float, help=confidence)
    overlap = "IoU above which two boxes are the same person (default: %(default)s; 1 = keep all)"
    add("--nms", type=float, default=NMS_IOU, help=overlap)


def add_boxes(parser: Parser) -> None:
    """--boxes, which `flags.finder_of` reads."""
    parser.add_argument("--boxes", metavar="RUN|FILE|faces", help=f"two-stage networks: {BOXES}")


def add_batches(parser: Parser) -> None:
    """--batch-size and --max-megapixels: how images are read and given to the model."""
    add, many = parser.add_argument, "images per call (default: %(default)s)"
    add("--batch-size", type=int, default=BATCH_SIZE, help=many)
    limit, text = MAX_MEGAPIXELS, "an image of more is an error (default: %(default)g)"
    add("--max-megapixels", type=float, default=limit, help=text)


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """'96x136,136x96' -> ((96, 136), (136, 96))."""
    sizes = []
    for part in text.split(","):
        height, _, width = part.partition("x")
        if not (height.isdigit() and width.isdigit() and min(int(height), int(width)) >= 32):
            wanted = "HEIGHTxWIDTH of at least 32 pixels, such as 800x1344"
            raise argparse.ArgumentTypeError(f"{part!r} is no {wanted}")
        sizes.append((int(height), int(width)))
    return tuple(sizes)


def predict() -> Parser:
    """Finds the people in images and videos, and their emotions; draws them and writes
    predictions.json and predictions.csv.

        python -m dsct_jax predict a.jpg folder/ 'x/*.png' b.mp4 --checkpoint=runs/demo --output=out
        python -m dsct_jax predict --camera=0 --seconds=30 --checkpoint=runs/demo --output=out

    Nothing but the pictures is needed: the model finds the people itself. The library function is
    `dsct_jax.predict`.

    """
    parser = Parser(description=predict.__doc__)
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="image, video, folder, or quoted glob pattern")
    add("--camera", type=int, help="number of a camera to watch, until --seconds or Ctrl-C")
    add_checkpoint(parser)
    files = "predictions.json, predictions.csv, contact_sheet.png and drawn/"
    parser.add_output("--output", folder=True, required=True, help=f"folder for {files}")
    add_selection(parser)
    add_boxes(parser)
    add_batches(parser)
    add("--every", type=int, default=1, help="videos: look at every N-th frame only")
    add("--seconds", type=float, help="videos and camera: stop after so many seconds")
    follow = "videos and camera: number people through the frames; timeline.csv and pictures"
    add("--follow", action="store_true", help=follow)
    skip = "skip and list files that are no images or videos, instead of stopping"
    add("--skip-unreadable", action="store_true", help=skip)
    return parser


def predict_many() -> Parser:
    """People and emotions of an archive of images as Parquet files; killed or not, alone or as one
    of many, each image gets one row. A damaged file is a row with an error.

        dsct predict-many photos/ --checkpoint=runs/demo --output=found
        dsct predict-many list.txt --checkpoint=runs/demo --output=found --shard=0/8

    """
    parser = Parser(description=predict_many.__doc__)
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="image, folder, pattern, or .txt: one per line")
    add_checkpoint(parser)
    parser.add_output("--output", folder=True, required=True, help="folder for part-*.parquet")
    add_selection(parser)
    add_boxes(parser)
    add_batches(parser)
    shard = "this process is number k, from 0, of n; default: as Slurm's array says, or 0/1"
    add("--shard", metavar="K/N", help=shard)
    add("--chunk", type=int, default=1000, help="images per file (default: %(default)s)")
    add("--decoders", type=int, default=4, help="threads that read images (default: %(default)s)")
    return parser


def serve() -> Parser:
    """A page for a browser, and POST /predict for programs: photographs in, people and their
    emotions out. Nothing is written to disk; there is no login and no encryption.

        python -m dsct_jax serve --checkpoint=runs/demo [--port=8000]
        curl --data-binary @photo.jpg "http://127.0.0.1:8000/predict?inside=1"

    """
    parser = Parser(description=serve.__doc__)
    add = parser.add_argument
    add_checkpoint(parser)
    add_selection(parser)
    add_boxes(parser)
    add("--host", default="127.0.0.1", help="0.0.0.0 = the whole network (default: %(default)s)")
    add("--port", type=int, default=8000, help="(default: %(default)s)")
    allowed = "another name under which the page may be asked for; may be repeated"
    add("--allow-host", action="append", default=[], metavar="NAME", help=allowed)
    add("--max-megabytes", type=float, default=20.0, help="of a picture (default: %(default)g)")
    add("--max-megapixels", type=float, default=50.0, help="of a picture (default: %(default)g)")
    add("--waiting", type=int, default=8, help="more requests get 503 (default: %(default)s)")
    return parser


def evaluate() -> Parser:
    """Every metric of a predictions_<split>.npz, computed again without a model.

    python -m dsct_jax evaluate runs/demo/predictions_test.npz [--output=FOLDER]

    """
    parser = Parser(description=evaluate.__doc__)
    add = parser.add_argument
    predictions = "predictions_<split>.npz, as train.py --mode=eval writes it"
    add("predictions", type=expanded_path, help=predictions)
    tables = "folder for metrics_<split>.json, .md and .png; default: only print the table"
    parser.add_output("--output", folder=True, help=tables)
    add("--nms", type=float, help="suppress queries that overlap more (IoU) before the selection")
    fitted = "thresholds.json of validation; default: what the file carries, or the one beside it"
    add("--thresholds", type=expanded_path, help=fitted)
    images = "of the images, for the 95 %% intervals; 0 = none (default: %(default)s)"
    add("--resamples", type=int, default=RESAMPLES, help=images)
    add("--seed", type=int, default=0, help="of the resampling (default: %(default)s)")
    return parser


def report() -> Parser:
    """What a run has learned so far: curves.png and metrics.md from its metrics.jsonl.

    python -m dsct_jax report runs/demo

    """
    parser = Parser(description=report.__doc__)
    parser.add_argument("workdir", type=expanded_path, help="the --workdir of a run")
    return parser


def visualize() -> Parser:
    """The paper's figures from any checkpoint and any images: what the network answered, and what
    it looked at.

        python -m dsct_jax visualize FIGURE PATH... --checkpoint=runs/demo --output=figure.png

    FIGURE is one of
        predictions   boxes and emotions, beside those of --ground-truth (Figures 5 and 6)
        activation    how strongly each level of the --stage (backbone or encoder) answers
                      (Figure 7)
        sampling      reference and sampling points of each person, alone and with the context
                      (Figures 8 and 9)
        context       the context queries that each layer selects for a person, and their weights
                      (Figures 4 and 10)
        compare       the answers of two checkpoints, such as early and late fusion (Figure 13)
        embeddings    principal components of the embeddings of all people
        losses        training loss of classification and localization; PATHs are runs (Figure 12)

    PATHs are images, folders or quoted patterns. --ground-truth is what `python -m data samples`
    writes beside the images (COCO style).
    """
    parser = Parser(description=visualize.__doc__)
    add = parser.add_argument
    add("figure", choices=FIGURES, metavar="FIGURE", help=", ".join(FIGURES))
    paths = "image, folder of images, or quoted glob pattern (losses: run directory)"
    add("paths", nargs="+", metavar="PATH", help=paths)
    add_checkpoint(parser, required=False)
    parser.add_output("--output", folder=False, required=True, help="the picture, .png")
    truth = "COCO-style annotations of the images (predictions, compare, embeddings)"
    add("--ground-truth", type=expanded_path, help=truth)
    add("--compare-with", type=expanded_path, help="second checkpoint (compare)")
    add("--compare-config", type=expanded_path, help="its configuration; needed for .pth only")
    add("--names", help="of the two checkpoints, as 'early fusion,late fusion' (compare)")
    stages = ["backbone", "encoder"]
    add("--stage", choices=stages, default=stages[0], help="whose maps are drawn (activation)")
    add("--layer", type=int, default=0, help="decoder layer from 1; 0 = the last (sampling)")
    add("--person", type=int, default=1, help="whose context queries; 1 = the surest (context)")
    add_selection(parser)
    return parser


def export() -> Parser:
    """A trained model for use elsewhere: StableHLO for any process with jax, safetensors, a .pth
    for the authors' code, ONNX.

        python -m dsct_jax export --checkpoint=runs/demo --output=exported --format=stablehlo
            [--sizes=96x136,136x96]

    stablehlo    model_HxW.stablehlo (a jax.export artifact for cpu, cuda and tpu, any batch size),
                 weights.npz and model.json; examples/run_exported.py runs it with jax and numpy
    safetensors  model.safetensors: weights, configuration and class names; `dsct_jax.load` reads it
    torch        model.pth with the released names, for the authors' code; needs no PyTorch
    onnx         model_HxW.onnx, any batch size (needs the onnx extra)

    What was written is read again and compared with the checkpoint. The moving average of the
    weights is exported where the run kept one. The same checkpoint gives the same bytes.
    """
    parser = Parser(description=export.__doc__)
    add = parser.add_argument
    add_checkpoint(parser)
    parser.add_output("--output", folder=True, required=True, help="directory for what is written")
    add("--format", required=True, help=" | ".join(FORMATS))
    sizes = "stablehlo, onnx: canvases as HEIGHTxWIDTH,...; default: those of the evaluation"
    add("--sizes", type=parse_sizes, default=(), help=sizes)
    return parser


def convert() -> Parser:
    """Turns third-party weights into a model of ours: one .safetensors file with its configuration,
    and an account of every tensor.

        python -m dsct_jax convert --input=FILE --output=DIR --config=configs/emotic_r50_released.py

    FILE is a released DSCT (.pth), a Deformable DETR (.pth of the original code, .safetensors of
    Hugging Face), a torchvision ResNet (.pth or .safetensors), or a run directory or .safetensors
    file of ours, which needs no --config. What a file does not have starts as in a fresh training
    with the configuration's seed. `--config.init_from=FILE` of train.py does the same at the start
    of a run.
    """
    parser = Parser(description=convert.__doc__)
    add = parser.add_argument
    add("--input", type=expanded_path, required=True, help="third-party weights, or our own model")
    files = "directory for model.safetensors and report.txt"
    parser.add_output("--output", folder=True, required=True, help=files)
    config = "configuration (.py or .json) of the model to make; a model of ours brings its own"
    add("--config", type=expanded_path, help=config)
    add("--lenient", action="store_true", help="skip and report what does not fit")
    return parser


def model_card() -> Parser:
    """A model card of a run: what the model is, what it was trained and measured on, how sure the
    numbers are, what it must not be used for.

        python -m dsct_jax model_card --workdir=runs/demo [--split=test] [--output=MODEL_CARD.md]

    Filled from the run's config.json, env.json, metrics_<split>.json (train.py --mode=eval) and
    what was fitted on validation to the same checkpoint. What a run cannot know stands in the card
    as a question, marked "(?)".
    """
    parser = Parser(description=model_card.__doc__)
    add = parser.add_argument
    add("--workdir", type=expanded_path, required=True, help="directory of the run")
    add("--split", default="test", help="whose metrics_<split>.json to show")
    parser.add_output("--output", folder=False, help="default: WORKDIR/MODEL_CARD.md")
    return parser


def publish() -> Parser:
    """Uploads a trained model and its model card to the Hugging Face hub, where
    --checkpoint=hf:ORG/NAME and dsct_jax.load("hf:ORG/NAME") find it. The repository is private
    unless told otherwise.

        dsct model_card --workdir=runs/mine        # then answer the questions in it
        hf auth login
        dsct publish --checkpoint=runs/mine --to=ORG/NAME --license=mit [--tag=v1] [--public]

    A model trained on data for non-commercial research (EMOTIC, CAER-S) is for that too: --license
    is then a name of your own and --license-link a page with its text.
    """
    parser = Parser(description=publish.__doc__)
    add = parser.add_argument
    add_checkpoint(parser)
    add("--to", required=True, metavar="ORG/NAME", help="repository, made if it is missing")
    license = "an identifier that the hub knows; with --license-link, any name"
    add("--license", required=True, help=license)
    add("--license-link", default="", help="address of a license that the hub does not know")
    add("--card", type=expanded_path, help="default: MODEL_CARD.md of the run")
    add("--split", default="test", help="whose metrics_<split>.json go on the page")
    add("--tag", default="", help="name of this version: hf:ORG/NAME@TAG")
    add("--public", action="store_true", help="everybody can see it")
    return parser
