"""The ten detectors of the paper's Table 10 on CAER-S, ResNet-50, one class head of 7 emotions.

    python train.py --config=configs/table10/dino.py --workdir=runs/dino --config.data.data_dir=DIR

The paper trained them "by leveraging the detrex platform" and does not say which variant of each,
nor with how many queries (its N is that of DSCT, whose accuracy is that of its row "Deformable
DETR"). Each is as its authors train it (`published` of its configuration), with what detrex is
known to do otherwise; of detrex's DINO the heads of each layer of its own are left out.
"""

from typing import Any

from configs import base, caer_s_r50


def detrex(network: str, **model: Any):
    """CAER-S with another network, the constants and the batch of detrex."""
    config = caer_s_r50.get_config()
    base.use_network(config, network)
    config.name = f"table10_{network}"
    config.model.update(sigmoid_epsilon=1e-3, **model)
    config.loss.giou_epsilon = 1e-6
    config.optimizer.learning_rate = 1e-4
    config.train.update(batch_size=16, eval_batch_size=16)
    return config
