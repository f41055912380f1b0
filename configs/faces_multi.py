"""From scratch on a CPU: small photographs with one to four faces each, COCO style json, CAER-S classes.

    python train.py --config=configs/faces_multi.py --workdir=runs/faces_multi --config.data.data_dir=DIR

DIR holds {train,val,test}.json and the images they name. A difference from faces_single: fewer images, so more epochs.
"""

from configs import faces_single


def get_config():
    config = faces_single.get_config()
    config.name = "faces_multi"
    config.train.update(epochs=64, eval_every=8.0, checkpoint_every=8.0)
    return config
