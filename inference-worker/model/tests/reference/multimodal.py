"""Llama 4 as it is published: the text model inside one that also sees images."""

import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4VisionConfig

MODEL = Llama4ForConditionalGeneration


def vision():
    """As small as the layout allows; a text model skips it."""
    return Llama4VisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        vision_output_dim=32,
        image_size=16,
        patch_size=8,
        pixel_shuffle_ratio=0.5,
        projector_input_dim=32,
        projector_output_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


@torch.no_grad()
def wrap(model):
    """The model with its weights, inside a multimodal one of the same precision."""
    config = Llama4Config(text_config=model.config, vision_config=vision())
    config._attn_implementation = "eager"
    torch.manual_seed(0)  # the image side keeps the weights it is made with
    whole = MODEL(config)
    for weight in whole.parameters():
        weight.data = weight.data.to(model.dtype)
    whole.language_model.load_state_dict(model.state_dict())
    return whole
