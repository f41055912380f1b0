r"""From scratch on a CPU: some thousand small images of one face each, CAER-S layout and classes.

    python train.py --config=configs/faces_single.py --workdir=runs/faces_single \
        --config.data.data_dir=DIR

DIR holds {train,val,test}/<Class>/*.jpg and {train,val,test}.json. faces_multi learns from more
images; docs/results.md says what that reaches.
"""

from configs import base, demo


def get_config():
    config = demo.get_config()
    config.name = "faces_single"
    config.class_names = base.CAER_S_CLASSES

    config.model.update(
        num_points=4,
        # the decoder reads the backbone's maps: half the time of a step on the CPU
        num_encoder_layers=0,
        num_decoder_layers=3,
        num_subject_queries=12,
        num_context_queries=16,
        num_semantic_neighbors=4,
        # a face is read cell by cell, in the box that the layers before have found
        box_refinement=True,
        roi_size=12,
        dropout=0.1,
    )
    # rare emotions are answered too
    config.loss.logit_adjustment = 0.5
    config.optimizer.update(warmup_steps=200, weight_decay=0.02)
    config.data.update(source="coco", train="train.json", val="val.json", test="test.json")
    config.data.update(color_jitter=0.3, grayscale_probability=0.2, erase_probability=0.3)
    config.data.update(short_sides=(104, 112, 120, 128), eval_short_side=120, max_long_side=176)
    config.data.buckets = ((128, 176), (176, 128))
    config.train.update(eval_batch_size=50, epochs=36, ema_decay=0.998)
    return config
