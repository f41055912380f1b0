"""The built-in scenes on a CPU in a few minutes: what `make demo` runs.

    python train.py --config=configs/demo.py --workdir=runs/demo

The emotion of a person follows from the face (half of the people), from something near, or from
something far; guessing is right for 25 %.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "demo"
    config.class_names = ("Anger", "Fear", "Happy", "Sad")
    config.multi_label = False

    config.model.update(backbone="small", norm="group", hidden_dim=64, num_heads=8, num_points=2)
    config.model.update(feedforward_dim=128, num_encoder_layers=1, num_decoder_layers=3)
    config.model.update(num_subject_queries=6, num_context_queries=24)
    config.model.update(num_spatial_neighbors=8, num_semantic_neighbors=8, dropout=0.0)
    config.model.remat = "none"  # a tenth faster, and memory is not scarce
    config.loss.class_loss = "softmax"
    # place alone: a cost that knows labels lets each query stand for one emotion, without looking
    config.matcher.cost_class = 0.0
    config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=100)
    config.optimizer.update(clip_norm=5.0, rules=((r".*", 1.0),))
    config.data.update(source="scenes", train="2000", val="200", test="400", max_targets=4)
    config.data.update(short_sides=(96,), max_long_side=144, eval_short_side=96)
    config.data.update(crop_probability=0.0, color_jitter=0.1, buckets=((96, 136), (136, 96)))
    config.data.update(num_workers=0, cache=True)
    config.train.update(batch_size=16, eval_batch_size=40, epochs=12, log_every=25)
    config.train.update(eval_every=2.0, checkpoint_every=2.0)
    return config
