"""A few steps of everything, in seconds: the tests of the run, and a first check after a change.

    python train.py --config=configs/debug.py --workdir=runs/debug

Four built-in scenes an epoch in batches of two on one canvas; what it learns in six steps means
nothing.
"""

from configs import base

CLASS_NAMES = ("Anger", "Fear", "Happy", "Sad")  # what the built-in scenes show


def get_config():
    config = base.get_config()
    config.name = "debug"
    config.class_names = CLASS_NAMES
    config.multi_label = False

    config.model.update(backbone="tiny", norm="group", hidden_dim=32, num_heads=2, num_points=2)
    config.model.update(feedforward_dim=32, num_encoder_layers=1, num_decoder_layers=2)
    config.model.update(num_subject_queries=4, num_context_queries=6)
    config.model.update(num_spatial_neighbors=2, num_semantic_neighbors=2)
    config.data.update(source="scenes", train="4", val="4", test="2", max_targets=4, num_workers=0)
    config.data.update(short_sides=(56, 64), max_long_side=80, eval_short_side=64)
    config.data.update(crop_resize=(64,), crop_size=(48, 64), buckets=((80, 80),))
    config.train.update(batch_size=2, eval_batch_size=2, epochs=3, log_every=1)
    return config
