r"""CAER-Net-S (Lee et al. 2019) as its public re-implementation trains it: SGD with Nesterov's
momentum 0.9, batch 128, 50 epochs. Published: 73.51 % accuracy (CAER-S).

    python train.py --config=configs/caer_net_s.py --workdir=runs/caer_net_s \
        --config.data.data_dir=DIR

Not run on CAER-S yet: the data must be asked for.
"""

from configs import glamor_net

PYTORCH = {"norm_epsilon": 1e-5, "norm_momentum": 0.1, "norm_variance": "torch", "initial": "torch"}


def get_config():
    config = glamor_net.get_config()
    config.name = "caer_net_s"
    config.model.update(attention="caer", attention_sum=False, vector_norm=True, **PYTORCH)
    config.model.update(resize="pil", context_corner=(8, 30), pixels="imagenet", rotation=0.0)
    config.optimizer.update(kind="nesterov", learning_rate=1e-2, drop_at=1.0, drop_again_at=())
    config.data.flip_probability = 0.0
    config.train.update(batch_size=128, epochs=50, early_stopping=20)
    return config
