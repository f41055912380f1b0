r"""NCAER-S (frames of the CAER videos, no video in two splits), ResNet-50, the recipe for CAER-S.

    python -m data build_ncaer_s --videos=CAER --output=DIR
    python train.py --config=configs/ncaer_s_r50.py --workdir=runs/ncaer_s_r50 \
        --config.data.data_dir=DIR

The authors' number of parts per video and their detector are not published, so that accuracies
compare within one build (its manifest.csv) only. Not run yet: the videos must be asked for.
"""

from configs import caer_s_r50


def get_config():
    config = caer_s_r50.get_config()
    config.name = "ncaer_s_r50"
    config.data.update(source="ncaer_s", train="train", val="val", test="test")
    return config
