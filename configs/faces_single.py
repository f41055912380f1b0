"""From scratch on a CPU: a few thousand small photographs with one face each, CAER-S layout and classes.

    python train.py --config=configs/faces_single.py --workdir=runs/faces_single --config.data.data_dir=DIR

DIR holds {train,val,test}/<Class>/*.jpg and {train,val,test}.json.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "faces_single"
    config.class_names = base.CAER_S_CLASSES
    config.multi_label = False

    config.model.update(
        backbone="small",
        norm="group",
        hidden_dim=64,
        num_heads=8,
        num_points=4,
        feedforward_dim=128,
        num_encoder_layers=0,
        num_decoder_layers=4,
        dropout=0.0,
        num_subject_queries=40,  # reference points all over the image: one is always near the face, and what it samples is aligned with it
        num_context_queries=16,
        num_spatial_neighbors=8,
        num_semantic_neighbors=4,
    )
    config.loss.class_loss = "softmax"
    config.matcher.cost_class = 0.0  # matched by place alone: a cost that knows the label lets each query stand for one emotion, without looking
    config.optimizer.update(
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=200,
        clip_norm=5.0,
        rules=((r".*", 1.0),),
    )
    config.data.update(
        source="coco",
        max_targets=4,
        short_sides=(88, 92, 96, 100, 104),
        max_long_side=144,
        crop_probability=0.0,
        color_jitter=0.3,
        grayscale_probability=0.1,
        eval_short_side=96,
        buckets=((104, 144), (128, 104)),
        num_workers=0,
        cache=True,
    )
    config.train.update(batch_size=16, eval_batch_size=50, epochs=10, eval_every=2.0, checkpoint_every=2.0, log_every=25)
    return config
