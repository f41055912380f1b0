r"""EMO-Net with two ResNet-50 and the subject masked in the context, after CAER-Net
(EMO-Net-R50-M in the paper's Table 4).

    python train.py --config=configs/emo_net_r50_m.py --workdir=runs/emo_net_r50_m \
        --config.data.data_dir=DIR
"""

from configs import emo_net_r50


def get_config():
    config = emo_net_r50.get_config()
    config.name = "emo_net_r50_m"
    config.model.face_in_context = "masked_own"
    return config
