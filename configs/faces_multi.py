r"""From scratch on a CPU: the images of faces_single and others with one to four faces together.

    python train.py --config=configs/faces_multi.py --workdir=runs/faces_multi \
        --config.data.data_dir=DIR

DIR holds single/ and multi/, each with {train,val,test}.json and the images they name, and nobody
in the training images of one who is in the test of the other. What it learns is tested on either:
--config.data.test=single:single/test.json.
"""

from configs import faces_single


def get_config():
    config = faces_single.get_config()
    config.name = "faces_multi"
    config.data.update(test="multi:multi/test.json")
    config.data.train = "single:single/train.json,multi:multi/train.json"
    config.data.val = "single:single/val.json,multi:multi/val.json"
    config.train.epochs = 30
    return config
