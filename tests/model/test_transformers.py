"""Networks that transformers has too: the same answers from a checkpoint that it wrote, with random
weights, by the names of the Hugging Face hub.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsct_jax.model.backbone import BACKBONES
from dsct_jax.model.build import Network, network_config
from dsct_jax.weights.pretrained import load_pretrained

pytestmark = pytest.mark.torch
CLASSES = ("a", "b", "c")
SIZES = {
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_queries": 20,
}
OURS = {
    "backbone": "tiny",
    "hidden_dim": 64,
    "num_heads": 4,
    "feedforward_dim": 128,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_queries": 20,
}
CASES = {
    "detr": ("Detr", {}, {}),
    "conditional_detr": ("ConditionalDetr", {}, {}),
    "dab_detr": ("DabDetr", {}, {}),
    "deformable_detr": ("DeformableDetr", {}, {}),
    "refined": ("DeformableDetr", {"with_box_refine": True}, {"box_refinement": True}),
    "two_stage": (
        "DeformableDetr",
        {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 20},
        {"box_refinement": True, "two_stage": True},
    ),
}


def their_model(kind, settings):
    import transformers

    levels = kind == "DeformableDetr"
    backbone = transformers.ResNetConfig(
        embedding_size=BACKBONES["tiny"].width,
        hidden_sizes=[32, 64, 128, 256],
        depths=list(BACKBONES["tiny"].blocks),
        layer_type="bottleneck",
        out_features=["stage2", "stage3", "stage4"] if levels else ["stage4"],
    )
    width = "hidden_size" if kind == "DabDetr" else "d_model"
    config = getattr(transformers, f"{kind}Config")(
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        num_labels=len(CLASSES),
        **{width: 64},
        **SIZES,
        **settings,
    )
    return getattr(transformers, f"{kind}ForObjectDetection")(config).eval()


def randomize(model):
    """Values that make every part matter."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.rand(value.shape, generator=generator)
            positive = "running_var" in name or (value.ndim == 1 and name.endswith("weight"))
            spread = 0.5 + noise if positive else (noise - 0.5)
            if value.ndim > 1:
                spread = 2 * spread / max(1, value[0].numel()) ** 0.5
            value.copy_(spread)


@pytest.mark.parametrize("name", CASES)
def test_the_answers_of_transformers(name, tmp_path):
    import safetensors.torch
    import torch

    kind, theirs, ours = CASES[name]
    model = their_model(kind, theirs)
    randomize(model)
    if kind == "DeformableDetr":  # save_pretrained drops what modules share; published files do not
        state = {key: value.clone() for key, value in model.state_dict().items()}
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    else:
        model.save_pretrained(tmp_path)
    images = np.random.default_rng(0).standard_normal((2, 72, 96, 3), np.float32)
    mask = np.zeros((2, 72, 96), bool)
    mask[0, :, 64:], mask[1, 48:] = True, True
    images[mask] = 0
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    if name != "dab_detr":  # theirs cannot compute in float64
        model, pixels = model.double(), pixels.double()
    with torch.no_grad():
        out = model(pixel_values=pixels, pixel_mask=torch.tensor(~mask).long())
    section = {"name": name if name.endswith("detr") else "deformable_detr"}
    default = network_config(section, len(CLASSES))
    config = dataclasses.replace(default, **OURS, **ours)
    network = Network(config)
    params, norm_stats, report = load_pretrained(
        tmp_path / "model.safetensors",
        network,
        *network.init(1),
        class_names=CLASSES,
        multi_label=True,
    )
    assert "Hugging Face" in report[0]
    values = jax.device_put((params, norm_stats))
    run = jax.jit(lambda values, *inputs: network.bind(*values)(*inputs))
    found = run(values, jnp.asarray(images), jnp.asarray(mask))
    logits = np.asarray(found.logits[-1])[..., : len(CLASSES)]
    np.testing.assert_allclose(found.boxes[-1], out.pred_boxes, rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits, out.logits[..., : len(CLASSES)], rtol=0, atol=1e-4)
