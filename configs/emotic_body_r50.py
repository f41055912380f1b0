r"""EMOTIC with the body boxes of Annotations.mat (PAMI 2019; protocol emotic_body_pami), ResNet-50
and the paper's recipe.

    python train.py --config=configs/emotic_body_r50.py --workdir=runs/emotic_body_r50 \
        --config.data.data_dir=DIR

DIR holds Annotations.mat, mscoco/, framesdb/, emodb_small/ and ade20k/. Another task than the
paper's head boxes: its 37.26 mAP is no number to compare with. For the CVPR 2017 annotations add
--config.data.{train,val,test}=CVPR17_Annotations.mat. Not run yet: the data must be asked for.
"""

from configs import emotic_r50


def get_config():
    config = emotic_r50.get_config()
    config.name = "emotic_body_r50"
    config.data.update(source="emotic", person_box="body", label_format="ids")
    config.data.update(train="Annotations.mat", val="Annotations.mat", test="Annotations.mat")
    config.data.max_targets = 32  # bodies per image; more is an error that names the image
    return config
