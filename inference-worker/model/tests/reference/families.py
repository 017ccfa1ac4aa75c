"""Configurations of the fixtures, and what the two families need to be built."""

from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

# Standard deviation of a layer's outputs for inputs of unit size.
GAINS = {
    "embed_tokens": 1.0,
    "q_proj": 1.1,
    "k_proj": 1.1,
    "v_proj": 1.0,
    "o_proj": 2.0,
    "gate_proj": 1.2,
    "gate_up_proj": 1.2,
    "up_proj": 1.2,
    "down_proj": 1.5,
    "router": 3.0,
    "lm_head": 2.0,
}
# A tied head sees the last token's own embedding, which would win every time.
TIED_GAINS = {"embed_tokens": 0.25, "o_proj": 3.0, "down_proj": 3.0}


def gain(name):
    return next(gain for part, gain in GAINS.items() if part in name)


def build(config):
    kind = LlamaForCausalLM if isinstance(config, LlamaConfig) else Llama4ForCausalLM
    config._attn_implementation = "eager"
    return kind(config).float().eval()


def watch_routers(model):
    """A list that the next forward pass fills with each router's logits."""
    seen = []
    for name, module in model.named_modules():
        if name.endswith("router"):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output[1]))
    return seen


def llama(**changes):
    numbers = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return LlamaConfig(**(numbers | changes))


def llama_plain():
    """Grouped heads whose width is hidden / heads, and a head of its own."""
    return llama(hidden_size=128, intermediate_size=160, num_hidden_layers=2)


def llama_tied():
    """Heads wider than hidden / heads, one KV head, and an odd vocabulary."""
    return llama(vocab_size=101, num_key_value_heads=1, tie_word_embeddings=True)


def llama_scaled():
    """Llama 3.1's scaling: of the 16 wavelengths, those under 32 stay, those over
    128 are stretched, and three lie between."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    return llama(rope_parameters=scaling)


def llama_every_head():
    """A KV head for every query head."""
    return llama(vocab_size=80, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8)


def llama_sharded():
    """Eight query heads that share two KV heads: splits into 1, 2, 4 and 8."""
    return llama(intermediate_size=256, num_attention_heads=8, num_key_value_heads=2)


def llama_constants():
    """Constants that no default has."""
    rope = {"rope_type": "default", "rope_theta": 731.0}
    return llama(rms_norm_eps=0.03, rope_parameters=rope)


def llama_two_layers():
    return llama(num_hidden_layers=2)


def llama_four_layers():
    """Enough for a recipe that leaves the first and the last alone."""
    return llama(num_hidden_layers=4)


def llama_wide():
    """All inputs are multiples of a group of 128."""
    return llama(hidden_size=128, intermediate_size=256, num_hidden_layers=2)


def llama4(**changes):
    numbers = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 64,
        "intermediate_size_mlp": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 16,
        "floor_scale": 16,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "use_qk_norm": True,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    return Llama4TextConfig(**(numbers | changes))


def llama4_scout():
    """Experts in every layer, normed queries and keys, and Scout's scaling, which
    has no smooth band."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 16,
    }
    return llama4(rope_parameters=scaling)


def llama4_maverick():
    """Dense layers and experts in turn, without norm and scaling."""
    return llama4(interleave_moe_layer_step=2, num_hidden_layers=6, use_qk_norm=False)


def llama4_untuned():
    """No temperature by position."""
    return llama4(num_hidden_layers=4, attn_temperature_tuning=False)


def llama4_eight_heads():
    """Two layers without rotary embedding, and splits into 1, 2, 4 and 8."""
    return llama4(
        hidden_size=32,
        intermediate_size=256,
        intermediate_size_mlp=256,
        interleave_moe_layer_step=2,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        attention_chunk_size=32,
    )


def llama4_small():
    return llama4(num_hidden_layers=4)


def old_spelling(config):
    """The configuration as checkpoints before transformers 5 spell it."""
    config = dict(config)
    for key in ("text_config", "vision_config"):
        if key in config:
            config[key] = old_spelling(config[key])
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    if "rope_parameters" in config:
        rope = dict(config.pop("rope_parameters"))
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if config.get("model_type") == "llama4_text":
        config["no_rope_layers"] = []
        config["for_llm_compressor"] = False
        del config["layer_types"], config["moe_layers"], config["no_rope_layer_interval"]
    if "transformers_version" in config:
        config["transformers_version"] = "4.51.0"
    return config
