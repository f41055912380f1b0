r"""GLAMOR-Net (Le et al. 2021) as its authors train it: SGD with momentum 0.9, batch 4, 60 epochs.

    python train.py --config=configs/glamor_net.py --workdir=runs/glamor_net \
        --config.data.data_dir=DIR

On CAER-S as configs/caer_s_r50.py reads it; the published 77.90 % is CAER-S, the authors' code
NCAER-S. Not run on them yet: the data must be asked for.
"""

from configs import base, caer_s_r50


def get_config():
    config = caer_s_r50.get_config()
    config.name = "glamor_net"
    base.use_network(config, "two_stage")
    config.train.batch_size = 4
    return config
