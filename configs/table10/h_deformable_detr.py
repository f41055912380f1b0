"""H-Deformable-DETR: two-stage, 300 + 1500 queries. Paper: 91.65 % accuracy."""

from configs import table10


def get_config():
    more = dict.fromkeys(
        ("box_refinement", "two_stage", "mixed_selection", "look_forward_twice"), True
    )
    config = table10.detrex(
        "deformable_detr", num_one_to_many=1500, feedforward_dim=2048, dropout=0.0, **more
    )
    config.name = "table10_h_deformable_detr"
    config.optimizer.drop_at, config.train.epochs = 11 / 12, 12.0
    return config
