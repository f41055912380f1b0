r"""From scratch on a CPU: some thousand small images of one face each, CAER-S layout and classes.

    python train.py --config=configs/faces_single.py --workdir=runs/faces_single \
        --config.data.data_dir=DIR

DIR holds {train,val,test}/<Class>/*.jpg and {train,val,test}.json. docs/results.md says what it
reaches.
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
        num_decoder_layers=4,
        # reference points all over the image: one is always near the face
        num_subject_queries=40,
        num_context_queries=16,
        num_semantic_neighbors=4,
        # what is sampled must be aligned with the face: without it no emotion is found
        box_refinement=True,
    )
    config.optimizer.warmup_steps = 200
    config.data.update(source="coco", train="train.json", val="val.json", test="test.json")
    config.data.update(color_jitter=0.3, grayscale_probability=0.1)
    config.data.update(short_sides=(88, 92, 96, 100, 104), buckets=((104, 144), (128, 104)))
    config.train.update(eval_batch_size=50, epochs=30)
    return config
