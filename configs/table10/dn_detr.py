"""DN-DETR: DAB-DETR with 5 groups of denoising queries. Paper: 89.79 % accuracy."""

from configs import table10


def get_config():
    config = table10.detrex("dab_detr", denoising_groups=5)
    config.name = "table10_dn_detr"
    return config
