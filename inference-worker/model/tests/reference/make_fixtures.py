#!/usr/bin/env python3
"""Makes the fixtures beside this file: small random models with the logits and
the greedy tokens that Hugging Face's implementation computes for them.

    python make_fixtures.py            # all of them
    python make_fixtures.py NAME...    # these

Needs torch 2.15.0, transformers 5.23.0 and safetensors 0.8.0, on a CPU. The same
versions on the same processor give the same bytes.

A fixture is a folder with a checkpoint as it would be published (config.json and
safetensors) and reference.safetensors:

    tokens   i64 [100]          the prompt
    logits   f32 [100, vocab]   after each of its tokens
    greedy   i64 [256]          the tokens that follow when the largest logit wins

References are computed in f32 from the values as stored: where a file holds BF16,
F16 or quantized weights, from those, widened.
"""

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import families
import multimodal
import quantized

FOLDER = Path(__file__).parent
PROMPT = 100
GREEDY = 256
# A test that compares within 1e-4 must not be decided by rounding.
LEAST_MARGIN = 3e-3
LEAST_ROUTER_MARGIN = 5e-4
MOST_NOISE = 2e-5
LEAST_DISTINCT = 16


@dataclass
class Fixture:
    """What a fixture is made of."""

    config: object
    seed: int
    dtype: torch.dtype = torch.bfloat16
    shard_size: str = "1GB"
    old_spelling: bool = False
    scheme: object = None
    gains: dict = field(default_factory=dict)
    multimodal: bool = False


FIXTURES = {
    "llama-plain": Fixture(families.llama_plain(), 1, dtype=torch.float32),
    "llama-tied": Fixture(families.llama_tied(), 1, dtype=torch.float16, gains=families.TIED_GAINS),
    "llama-scaled": Fixture(families.llama_scaled(), 5, old_spelling=True),
    "llama-every-head": Fixture(families.llama_every_head(), 1),
    "llama-sharded": Fixture(families.llama_sharded(), 2, shard_size="160KB"),
    "llama-constants": Fixture(families.llama_constants(), 1),
    "llama4-scout": Fixture(families.llama4_scout(), 2),
    "llama4-maverick": Fixture(families.llama4_maverick(), 14),
    "llama4-untuned": Fixture(families.llama4_untuned(), 1),
    "llama4-eight-heads": Fixture(families.llama4_eight_heads(), 1),
    "llama4-multimodal": Fixture(families.llama4_scout(), 2, old_spelling=True, multimodal=True),
    "llama-fp8-fbgemm": Fixture(families.llama_four_layers(), 2, scheme=quantized.Fbgemm()),
    "llama-fp8-channel": Fixture(families.llama_two_layers(), 1, scheme=quantized.FloatChannel()),
    "llama-int8-channel": Fixture(families.llama_two_layers(), 4, scheme=quantized.IntChannel()),
    "llama-int4-group": Fixture(families.llama_wide(), 2, scheme=quantized.IntGroup()),
    "llama4-unfused": Fixture(families.llama4_small(), 2, scheme=quantized.FloatChannelExperts()),
}


def main():
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in sys.argv[1:] or FIXTURES:
        print(f"{name}: {make(name, FIXTURES[name])}")


def make(name, fixture):
    """Writes one fixture and says what was measured."""
    model = families.build(fixture.config)
    generator = torch.Generator().manual_seed(fixture.seed)
    randomize(model, generator, fixture.gains)
    stored = store_exactly(model, fixture)
    reference, measured = measure(model, generator)
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    save(model, stored, fixture, folder)
    save_file(reference, folder / "reference.safetensors")
    if fixture.scheme is None:
        check_reload(folder, fixture, reference)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return f"{size / 1024:.0f} KiB, {measured}"


@torch.no_grad()
def randomize(model, generator, gains):
    """Draws weights much larger than a trained model's start, with rows of unlike
    size: attention is then far from uniform, and an exchanged row shows."""
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
            continue
        gain = next((gain for part, gain in gains.items() if part in name), None)
        gain = families.gain(name) if gain is None else gain
        drawn = torch.randn(weight.shape, generator=generator)
        if "embed_tokens" in name:
            weight.copy_(gain * drawn)
            continue
        # Experts that are one tensor are stored [expert, in, out], others [out, in].
        fused = weight.dim() == 3
        inputs = weight.shape[1] if fused else weight.shape[-1]
        sizes = (weight.shape[0], 1, weight.shape[2]) if fused else (weight.shape[0], 1)
        rows = 0.5 + torch.rand(sizes, generator=generator)
        weight.copy_(gain * inputs**-0.5 * rows * drawn)


@torch.no_grad()
def store_exactly(model, fixture):
    """Rounds the weights to what the file can hold. Returns the tensors that a
    quantized file holds in their place."""
    for weight in model.parameters():
        weight.copy_(weight.to(fixture.dtype))
    return fixture.scheme.quantize(model) if fixture.scheme else {}


@torch.no_grad()
def measure(model, generator):
    """The reference, and its margins in words."""
    vocab = model.config.vocab_size
    tokens = torch.randint(vocab, (PROMPT,), generator=generator)
    sequence = tokens.clone()
    for _ in range(GREEDY):
        sequence = torch.cat([sequence, logits_of(model, sequence)[-1:].argmax(-1)])
    greedy = sequence[PROMPT:]
    routers = families.watch_routers(model)
    logits = logits_of(model, sequence)
    margins = check_margins(logits[PROMPT - 1 : -1], greedy)
    if routers:
        margins += ", " + check_routers(routers)
    margins += ", " + check_noise(model, sequence, logits)
    reference = {"tokens": tokens, "logits": logits[:PROMPT].contiguous(), "greedy": greedy}
    return reference, margins


def logits_of(model, tokens):
    return model(input_ids=tokens[None], use_cache=False).logits[0]


def check_margins(logits, greedy):
    best = logits.topk(2).values
    margin = (best[:, 0] - best[:, 1]).min().item()
    distinct = greedy[GREEDY // 2 :].unique().numel()
    assert torch.equal(logits.argmax(-1), greedy), "greedy tokens change with the length"
    assert margin > LEAST_MARGIN, f"two tokens are only {margin:.1e} apart"
    assert distinct >= LEAST_DISTINCT, f"only {distinct} tokens in the last half"
    return f"margin {margin:.4f}, {distinct} distinct, spread {logits.std().item():.1f}"


def check_routers(routers):
    """No token may be near to choosing another expert, and no expert idle."""
    margins = []
    for logits in routers:
        best = logits.topk(2).values
        margins.append((best[:, 0] - best[:, 1]).min().item())
        used = logits.argmax(-1).unique().numel()
        assert used == logits.shape[-1], f"{used} of {logits.shape[-1]} experts are used"
    assert min(margins) > LEAST_ROUTER_MARGIN, f"a router is {min(margins):.1e} from a tie"
    return f"router margin {min(margins):.4f}"


def check_noise(model, tokens, logits):
    """How far f32 is from f64, wherever the implementation itself does not narrow."""
    wide = logits_of(model.double(), tokens)
    noise = (wide - logits).abs().max().item()
    model.float()
    assert noise < MOST_NOISE, f"rounding alone moves logits by {noise:.1e}"
    return f"noise {noise:.1e}"


def save(model, stored, fixture, folder):
    """Writes config.json and the weights."""
    narrow = model.to(fixture.dtype)
    if fixture.multimodal:
        narrow = multimodal.wrap(narrow)
    narrow.save_pretrained(folder, max_shard_size=fixture.shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if fixture.scheme:
        quantized.replace_tensors(folder, stored, fixture.scheme)
    if fixture.old_spelling:
        rewrite_config(folder / "config.json", families.old_spelling)
    model.float()


def rewrite_config(path, change):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(change(config), indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def check_reload(folder, fixture, reference):
    """The files must give the same logits to whoever loads them."""
    kind = multimodal.MODEL if fixture.multimodal else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    logits = logits_of(model, reference["tokens"])
    difference = (logits - reference["logits"]).abs().max().item()
    assert difference < MOST_NOISE, f"{folder.name} loads with logits {difference:.1e} away"


if __name__ == "__main__":
    main()
