r"""EMOTIC (head boxes, protocol emotic_head_dsct), ResNet-50, the paper's recipe: 8 GPUs, batch 32.

    python train.py --config=configs/emotic_r50.py --workdir=runs/emotic_r50 \
        --config.data.data_dir=DIR

DIR holds mscoco/, emodb_small/, ade20k/ and {train,val,test}.json with 26-bit labels. Paper: 37.26
mAP (chance 21.9); the released code's own rerun: 36.21. Not reproduced here yet: the data must be
asked for, and the paper starts from weights pretrained on COCO.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "emotic_r50"
    config.data.label_format = "bits"
    config.train.update(batch_size=32, eval_batch_size=32)
    return config
