r"""GLAMOR-Net with two ResNet-18, of which no code is public: 512 channels for 256, PyTorch's batch
norms, the recipe of GLAMOR-Net at a tenth of the rate in the encoders. Published: 89.88 % (CAER-S).

    python train.py --config=configs/glamor_net_r18.py --workdir=runs/glamor_net_r18 \
        --config.data.data_dir=DIR --config.init_from=resnet18.pth
"""

from configs import caer_net_s, glamor_net


def get_config():
    config = glamor_net.get_config()
    config.name = "glamor_net_r18"
    config.model.update(encoder="resnet18", pixels="imagenet", **caer_net_s.PYTORCH)
    config.model.update(context_size=224, context_resize=(256, 342), context_corner=(16, 59))
    config.optimizer.learning_rate = 1e-3
    config.optimizer.rules = ((r"(face|context)/.*", 0.1), (r"(?!(face|context)/).*", 1.0))
    return config
