r"""EMO-Net with two ResNet-50 (EMO-Net-R50 in the paper's Table 4), to be about as large as DSCT.

    python train.py --config=configs/emo_net_r50.py --workdir=runs/emo_net_r50 \
        --config.data.data_dir=DIR
"""

from configs import emo_net


def get_config():
    config = emo_net.get_config()
    config.name = "emo_net_r50"
    config.model.encoder = "resnet50"
    return config
