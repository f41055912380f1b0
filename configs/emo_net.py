r"""EMO-Net (Kosti et al. 2020) as its usual re-implementation trains it: two ResNet-18, weighted
squared errors, Adam, body boxes.

    python train.py --config=configs/emo_net.py --workdir=runs/emo_net --config.data.data_dir=DIR

DIR as in configs/emotic_body_r50.py. Not run on EMOTIC yet: the data must be asked for.
"""

from configs import base, caer_net_s, emotic_body_r50

# loss.squared_weights="static": loss.class_weights, in the order of the classes
STATIC_WEIGHTS = (
    0.1435, 0.1870, 0.1692, 0.1165, 0.1949, 0.1204, 0.1728, 0.1372, 0.1620,
    0.1540, 0.1987, 0.1057, 0.1482, 0.1192, 0.1590, 0.1929, 0.1158, 0.1907,
    0.1345, 0.1307, 0.1665, 0.1698, 0.1797, 0.1657, 0.1520, 0.1537,
)  # fmt: skip


def get_config():
    config = emotic_body_r50.get_config()
    config.name = "emo_net"
    base.use_network(config, "two_stage")
    config.model.update(encoder="resnet18", attention="none", fusion="linear", hidden_dim=256)
    config.model.update(face_in_context="visible", resize="opencv", pixels="emotic", rotation=0.0)
    config.model.update(subject_size=128, context_size=224, context_resize=(224, 224))
    config.model.update(context_corner=(0, 0), augment_context=True, **caer_net_s.PYTORCH)
    config.loss.update(class_loss="squared", weight_class=0.5)
    config.optimizer.update(kind="adam", learning_rate=1e-2, weight_decay=5e-4)
    config.optimizer.update(drop_at=7 / 15, drop_again_at=(14 / 15,), lowest_rate=0.0)
    config.data.color_jitter = 0.4
    config.train.update(batch_size=52, eval_batch_size=52, epochs=15)
    return config
