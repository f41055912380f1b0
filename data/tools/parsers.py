"""The command lines of `python -m data`, --help included, apart from the commands, which import
more than --help can wait for.
"""

import argparse
import os
from pathlib import Path

from data.command import ConfigParser, splits_argument
from data.config import SPLITS
from dsct_jax.cli import Parser
from dsct_jax.config import expanded_path

CONFIGS = Path(__file__).parents[2] / "configs"
NEAR = 24
NEAR_HELP = f"bits of 256 that images looking alike differ in at most (default {NEAR})"
COMMANDS = {
    "import": "another tool's export as a data set, and a configuration for it",
    "check": "counts, labels, damaged files and images that are in two splits",
    "show": "a sheet of raw and augmented samples",
    "samples": "the first images of a split as files, with their annotations",
    "split": "train, val and test files from one annotation file, grouped by image content",
    "prepare": "images resized once and packed into a few large files",
    "build_ncaer_s": "NCAER-S from the CAER videos",
}
SEE_ALSO = "To predict, evaluate, draw, export or serve: python -m dsct_jax COMMAND."


def parse_shares(text: str) -> list[float]:
    """The type of --shares."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != len(SPLITS) or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text} must be three numbers, those of {', '.join(SPLITS)}, such as 70,10,20"
        )
    return shares


def import_() -> Parser:
    """Makes a data set of what an annotation tool exports: COCO json (of Roboflow, CVAT and
    others), the XML of CVAT for images, Label Studio's JSON or JSON-MIN, json or csv of VIA.

        python -m data import EXPORT --output=DIR [--images=FOLDER] [--label-attribute=emotion]
        python train.py --config=DIR/config.py --workdir=runs/mine

    EXPORT is the file, or the folder with it or with one for each split. DIR gets
    {train,val,test}.json, which name the images where they are, and config.py, the configuration
    --like with the annotated classes. Splits are made where there are none; images that look alike
    stay in one of them.
    """
    parser = Parser(description=import_.__doc__)
    text = "file, or folder with one or more, of annotations"
    parser.add_argument("export", type=expanded_path, metavar="EXPORT", help=text)
    text = "folder for {train,val,test}.json and config.py"
    parser.add_output("--output", folder=True, required=True, help=text)
    text = "folder with the images, where they do not lie with the annotations"
    parser.add_argument("--images", type=expanded_path, help=text)
    text = "what holds a person's class, where it is an attribute (CVAT, VIA, Label Studio)"
    parser.add_argument("--label-attribute", default="", metavar="NAME", help=text)
    text = "file of configs/ that is changed (default %(default)s; faces_single: for a CPU)"
    names = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__")
    parser.add_argument("--like", default="caer_s_r50", choices=names, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of the division into splits")
    return parser


def check() -> ConfigParser:
    """Reads all data of a configuration and reports what they are: counts, labels, boxes, damaged
    files, and images that are in two splits.

        python -m data check --config=configs/caer_s_r50.py --config.data.data_dir=DIR

    Status 1 with errors (lines that begin with !), 2 when the annotations cannot be used at all.

    """
    parser = ConfigParser(check.__doc__)
    parser.add_argument("--split", type=splits_argument, default=SPLITS, help="default: all")
    parser.add_argument("--near", type=int, default=NEAR, help=NEAR_HELP)
    parser.add_workers("images decoded at once")
    parser.add_output("--report", folder=False, help="json file for everything that is found")
    return parser


def show() -> ConfigParser:
    """What a network is shown: raw images with their people beside what the augmentation makes of
    them, on one sheet.

        python -m data show --config=configs/demo.py --split=train -n 24 --output=samples.png

    """
    parser = ConfigParser(show.__doc__)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("-n", "--count", type=int, default=24, help="images on it (default 24)")
    text = "config.seed of the training to look at (default 0)"
    parser.add_argument("--seed", type=int, default=0, help=text)
    output = Path("samples.png")
    parser.add_output("--output", folder=False, default=output, help=f"default {output}")
    return parser


def samples() -> ConfigParser:
    """The first images of a split as files, with their people in one COCO-style file: something to
    predict on, to draw, or to look at.

        python -m data samples --config=configs/demo.py --split=test -n 12 --output=samples

    Writes OUTPUT/<split>_00000.png ... and OUTPUT/truth.json (`--ground-truth` of python -m
    dsct_jax visualize). The built-in scenes have no files otherwise.
    """
    parser = ConfigParser(samples.__doc__)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("-n", "--count", type=int, default=12, help="number of images")
    parser.add_argument("--first", type=int, default=0, help="number of the first one, from 0")
    text = "folder for the images and truth.json"
    parser.add_output("--output", folder=True, required=True, help=text)
    return parser


def split() -> ConfigParser:
    """Divides images into train, val and test, by chance or so that nothing alike is in two of
    them; writes COCO-style json, copies no image.

        python -m data split --config=configs/caer_s_r50.py --config.data.data_dir=DIR \\
            --config.data.train=train.txt --config.data.test=test.txt --from=train,test \\
            --output=DIR/splits [--by=content] [--shares=70,10,20] [--seed=0]

    The paper divides CAER-S by image, 70/10/20 (--by=image). Its images are frames of television
    scenes, so that a test image then has close relatives in train; --by=content keeps images that
    look alike together, --by=clip what a file of lines `path,clip` says comes from one clip. Then
    read it with --config.data.train=splits/train.json and so on (docs/datasets.md).
    """
    parser = ConfigParser(split.__doc__)
    source, shares = ["train", "test"], [70, 10, 20]
    text = "splits to divide; default train,test"
    parser.add_argument("--from", dest="source", type=splits_argument, default=source, help=text)
    parser.add_output("--output", folder=True, required=True, help="for {train,val,test}.json")
    text = "of train, val and test; default 70,10,20, the paper's"
    parser.add_argument("--shares", type=parse_shares, default=shares, help=text)
    choices = ["image", "content", "clip"]
    parser.add_argument("--by", choices=choices, default="image", help="what is never divided")
    text = "for --by=clip: lines path,clip, the paths as the annotations have them"
    parser.add_argument("--clips", type=expanded_path, help=text)
    text = f"for --by=content: {NEAR_HELP}"
    parser.add_argument("--near", type=int, default=NEAR, help=text)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_workers("images decoded at once")
    return parser


def prepare() -> ConfigParser:
    """Brings a data set into the prepared form (data/readers/prepared.py): once, in parallel, and
    after an interruption from where it stood.

        python -m data prepare --config=configs/caer_s_r50.py --config.data.data_dir=DIR \\
            --output=PREPARED
        python train.py --config=configs/caer_s_r50.py --config.data.source=prepared \\
            --config.data.data_dir=PREPARED ...

    Training sees the same pixels: images keep their bytes, and those that an EXIF orientation turns
    become PNG. --short_side=N makes those whose short side is longer smaller (JPEG, quality 95),
    and their boxes with them.
    """
    parser = ConfigParser(prepare.__doc__)
    text = "folder of the prepared data: later config.data.data_dir"
    parser.add_output("--output", folder=True, required=True, help=text)
    text = "only this one; may be given several times"
    parser.add_argument("--split", action="append", choices=SPLITS, help=text)
    text = "reduce images whose short side has more pixels than this"
    parser.add_argument("--short_side", type=int, help=text)
    parser.add_argument("--shard_images", type=int, default=256, help="images per file")
    parser.add_workers("threads")
    text = "only compare the files there with their checksums"
    parser.add_argument("--verify", action="store_true", help=text)
    return parser


def build_ncaer_s() -> Parser:
    """Makes NCAER-S from the CAER videos: one random frame of each part of a video, its face, and
    no video in two splits. docs/datasets.md describes the folders.

        python -m data build_ncaer_s --videos=CAER --output=NCAER-S [--parts=4] [--detector=haar]

    The same videos, parts, seed and detector give the same files whatever the number of workers; an
    interrupted build goes on where it was.

    """
    parser = Parser(description=build_ncaer_s.__doc__)
    text = "folder with {train,validation,test}/<Class>/*.avi"
    parser.add_argument("--videos", type=expanded_path, required=True, help=text)
    text = "folder for images/, crop/ and manifest.csv"
    parser.add_output("--output", folder=True, required=True, help=text)
    text = "stretches of a video that give one frame each (default 4)"
    parser.add_argument("--parts", type=int, default=4, help=text)
    parser.add_argument("--seed", type=int, default=0)
    text = "haar, yunet:MODEL.onnx, or MODULE:NAME, a function of your own (dsct_jax/faces.py)"
    parser.add_argument("--detector", default="haar", help=text)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    return parser
