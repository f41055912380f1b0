r"""On from faces_single, on a CPU: small images with one to four faces each, COCO style json,
CAER-S classes.

    python train.py --config=configs/faces_multi.py --workdir=runs/faces_multi \
        --config.data.data_dir=DIR --config.init_from=runs/faces_single

DIR holds {train,val,test}.json and the images they name. A thousand images teach where faces are,
not what they feel: from scratch, 64 epochs end at the most frequent class; from the weights of
faces_single, 12 epochs do not (docs/results.md).
"""

from configs import faces_single


def get_config():
    config = faces_single.get_config()
    config.name = "faces_multi"
    config.optimizer.learning_rate = 5e-4
    config.train.update(epochs=12)
    return config
