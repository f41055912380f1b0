r"""CAER-S as the authors' released script runs it: fusion off, class weight 9, lr 2e-5, batch 4.
Their README reports 89.19 % accuracy.

    python train.py --config=configs/caer_s_r50_released.py --workdir=runs/caer_s_r50_released \
        --config.data.data_dir=DIR
"""

from configs import caer_s_r50


def get_config():
    config = caer_s_r50.get_config()
    config.name = "caer_s_r50_released"
    config.model.update(fusion="released", semantic_selection="largest")
    config.model.update(num_spatial_neighbors=0, num_semantic_neighbors=0)
    config.loss.weight_class = 9.0
    config.optimizer.learning_rate = 2e-5
    config.data.exif = "stored"
    config.train.update(batch_size=4, eval_batch_size=4)
    return config
