#!/usr/bin/env python3
"""Writes what Meta's reference makes of the strings of strings.rs: llama3.hashes and
llama4.hashes. Run with `llama-models` 0.3.0 and `tiktoken` 0.14.0 installed, no
tests need this."""

import importlib
from pathlib import Path

COUNT = 10_000
MASK = (1 << 64) - 1
SPACES = [" ", " ", " ", "\n", "\n", "\r", "\t", "\r\n", "\u00a0", "\u2003", "\u3000", "\u0085", "\u000b", "\u001c", "\u2028"]
ENDINGS = ["'s", "'S", "'t", "'re", "'VE", "'ll", "'Ll", "'D", "'m", "\u2019s", "'\u017f", "'"]
DIGITS = [0x30, 0x30, 0x30, 0x660, 0x966, 0xFF10]
OTHER_NUMBERS = ["\u00b2", "\u00bd", "\u2167", "\u3220", "\u0bf0"]
LETTERS = "abcxyzABCXYZ\u00e4\u00df\u00c9\u01c5\u02b0\u0131\u0130\u0434\u0416\u03a3\u03c2\u4e2d\u05d0\u0e01\u212a"
BLOCKS = [(0x20, 0x7F), (0xA0, 0x180), (0x370, 0x530), (0x590, 0x700), (0x900, 0xA00), (0xE00, 0xE80), (0x1100, 0x1200),
          (0x2000, 0x2070), (0x20A0, 0x2200), (0x3040, 0x3100), (0x4E00, 0x5200), (0xAC00, 0xAD00), (0xFE00, 0xFF00), (0x1F300, 0x1F700)]
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\u2026\u2014\u00ab\u3002"
CONTROL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|reserved_special_token_0|>"],
    "llama4": ["<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>", "<|python_start|>",
               "<|image|>", "<|patch|>", "<|reasoning_thinking_start|>", "<|reserved_special_token_0|>"],
}
BROKEN = ["<|eot", "|>", "<|", "<|end_of_text|", "<|eot_id |>", "<||>"]
EMOJI = ["\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f"]


class Random:
    """splitmix64."""

    def __init__(self, seed):
        self.state = seed

    def below(self, count):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return ((z ^ (z >> 31)) >> 32) * count >> 32

    def pick(self, items):
        return items[self.below(len(items))]


def words(random, vocabulary, most):
    """Tokens of the vocabulary that are text by themselves."""
    out = ""
    for _ in range(1 + random.below(most)):
        try:
            out += vocabulary[random.below(len(vocabulary))].decode()
        except UnicodeDecodeError:
            pass
    return out


def part(random, vocabulary, control):
    kind = random.below(11)
    if kind < 2:
        return words(random, vocabulary, 1 + 4 * kind)
    times = 1 + random.below(8)
    if kind == 2:
        return "".join(random.pick(SPACES) for _ in range(times))
    if kind == 3:
        zero = random.pick(DIGITS)
        digits = "".join(chr(zero + random.below(10)) for _ in range(times))
        return digits + random.pick(OTHER_NUMBERS) if random.below(4) == 0 else digits
    if kind == 4:
        return words(random, vocabulary, 1) + random.pick(ENDINGS)
    if kind == 5:
        start, end = random.pick(BLOCKS)
        return "".join(chr(start + random.below(end - start)) for _ in range(times))
    if kind == 6:
        points = (random.below(0x110000 - 0x800) for _ in range(times))
        return "".join(chr(point + 0x800 if point >= 0xD800 else point) for point in points)
    if kind == 7:
        marks = "".join(random.pick(PUNCTUATION) for _ in range(times))
        return marks + random.pick(["", "\n", "/\n", "\r\n\n"])
    if kind == 8:
        return random.pick(control) if random.below(3) else random.pick(BROKEN)
    if kind == 9:
        marks = "".join(chr(0x300 + random.below(0x70)) for _ in range(times))
        return random.pick(EMOJI) if random.below(2) else random.pick(LETTERS) + marks
    return "".join(random.pick(LETTERS) for _ in range(times))


def string(number, vocabulary, control):
    random = Random(number)
    return "".join(part(random, vocabulary, control) for _ in range(1 + random.below(10)))


def fnv(data, value=0xCBF29CE484222325):
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return value


def encode(tokenizer, text, allowed):
    ids = tokenizer.encode(text, bos=False, eos=False, allowed_special=allowed)
    return b"".join(id.to_bytes(4, "little") for id in ids)


def main():
    for family, control in CONTROL.items():
        tokenizer = importlib.import_module(f"llama_models.{family}.tokenizer").Tokenizer.get_instance()
        ranks = tokenizer.model._mergeable_ranks
        vocabulary = sorted(ranks, key=ranks.get)
        all_strings, hashes = 0xCBF29CE484222325, []
        for number in range(COUNT):
            text = string(number, vocabulary, control)
            all_strings = fnv(text.encode() + b"\xff", all_strings)
            ids = encode(tokenizer, text, set()) + b"\xff" * 4 + encode(tokenizer, text, "all")
            hashes.append(f"{fnv(ids) & 0xFFFFFFFFFF:010x}")
        lines = [f"{all_strings:016x}"] + ["".join(hashes[at : at + 10]) for at in range(0, COUNT, 10)]
        Path(__file__).with_name(f"{family}.hashes").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
