r"""EMOTIC as the authors' released code runs it: its fusion and selection, batch 4 on one GPU.
Their README reports 36.21 mAP (chance 21.9).

    python train.py --config=configs/emotic_r50_released.py --workdir=runs/emotic_r50_released \
        --config.data.data_dir=DIR

It goes with the released EMOTIC weights: dsct_jax.load("released.pth", config=get_config()).
"""

from configs import emotic_r50


def get_config():
    config = emotic_r50.get_config()
    config.name = "emotic_r50_released"
    config.model.update(fusion="released", semantic_selection="largest")
    config.data.exif = "stored"
    config.train.update(batch_size=4, eval_batch_size=4)
    return config
