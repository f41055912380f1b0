r"""CAER-S with ResNet-50, the paper's recipe: 9 subject queries, batch 32. Paper: 91.81 % accuracy.

    python train.py --config=configs/caer_s_r50.py --workdir=runs/caer_s_r50 \
        --config.data.data_dir=DIR

DIR holds the class folders and {train,val,test}.json (COCO style, class ids 0 to 6). Not reproduced
here yet: the data must be asked for.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "caer_s_r50"
    config.class_names = base.CAER_S_CLASSES
    config.multi_label = False
    config.model.num_subject_queries = 9  # Table 5
    config.data.source = "caer_s"
    config.train.update(batch_size=32, eval_batch_size=32)
    return config
