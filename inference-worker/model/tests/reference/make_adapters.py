#!/usr/bin/env python3
"""Makes adapters of the fixtures beside this file, as PEFT saves them, with the logits
that PEFT computes.

    python make_adapters.py

Needs peft 0.21.2 beside what make_fixtures.py needs. A fixture is a folder with
adapter_config.json, adapter_model.safetensors and reference.safetensors:

    tokens   i64 [40]          the prompt
    logits   f32 [40, vocab]   after each of its tokens
"""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).parent
PROMPT = 40
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
NETWORK = ["gate_proj", "up_proj", "down_proj"]

ADAPTERS = {
    "adapter-llama": ("llama-plain", LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION + NETWORK)),
    "adapter-llama-stable": (
        "llama-plain",
        LoraConfig(r=40, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    ),
    "adapter-llama4": ("llama4-maverick", LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION + NETWORK)),
}


def main():
    torch.set_num_threads(1)
    for seed, (name, (base, config)) in enumerate(ADAPTERS.items()):
        print(f"{name}: {make(FOLDER / name, FOLDER / base, config, seed)}")


@torch.no_grad()
def make(folder, base, config, seed):
    generator = torch.Generator().manual_seed(seed)
    model = get_peft_model(load(base), config)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.5 * weight.shape[1] ** -0.5 * drawn)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    settings = folder / "adapter_config.json"
    kept = json.loads(settings.read_text()) | {"base_model_name_or_path": base.name}
    settings.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)
    (folder / "README.md").unlink(missing_ok=True)
    tokens = torch.randint(model.config.vocab_size, (PROMPT,), generator=generator)
    plain = load(base)(input_ids=tokens[None], use_cache=False).logits[0]
    adapted = PeftModel.from_pretrained(load(base), folder).eval()
    logits = adapted(input_ids=tokens[None], use_cache=False).logits[0]
    reference = folder / "reference.safetensors"
    save_file({"tokens": tokens, "logits": logits.contiguous()}, reference)
    reference.chmod(0o644)
    return f"logits moved by {(logits - plain).abs().mean().item():.2f} in the mean"


def load(base):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


if __name__ == "__main__":
    main()
