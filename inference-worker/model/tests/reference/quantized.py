"""Layouts of quantized checkpoints, written out from their definitions.

Every weight is stored as integers or FP8 with scales, and the model computes with
the product of the two in f32. Activations stay f32, whatever the recipe says.
"""

import json
import re

import torch
from safetensors.torch import load_file, save_file

FP8_MOST = torch.finfo(torch.float8_e4m3fn).max


class Scheme:
    """Quantizes a model's linear layers, but for those `ignore` matches."""

    ignore = ["lm_head"]

    def quantize(self, model):
        """Replaces weights by what the file holds of them; returns the file's tensors."""
        stored = {}
        for name, module in list(model.named_modules()):
            if hasattr(module, "gate_up_proj") and module.gate_up_proj.dim() == 3:
                stored |= self.quantize_experts(name, module)
            elif isinstance(module, torch.nn.Linear) and not self.ignores(name):
                tensors, weight = self.pack(module.weight)
                module.weight.copy_(weight)
                stored |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
        return stored

    def quantize_experts(self, name, experts):
        """Writes each expert by itself, as linear layers are: [out, in]."""
        stored = {}
        half = experts.gate_up_proj.shape[-1] // 2
        for index in range(experts.gate_up_proj.shape[0]):
            both = experts.gate_up_proj[index]
            parts = {
                "gate_proj": both[:, :half],
                "up_proj": both[:, half:],
                "down_proj": experts.down_proj[index],
            }
            for part, view in parts.items():
                tensors, weight = self.pack(view.T.contiguous())
                view.copy_(weight.T)
                stored |= {f"{name}.{index}.{part}.{key}": value for key, value in tensors.items()}
        return stored

    def ignores(self, name):
        """As compressed-tensors reads such a list: names, or `re:` and a pattern that
        matches from the start."""
        return any(
            re.match(entry[3:], name) if entry.startswith("re:") else entry == name
            for entry in self.ignore
        )

    def pack(self, weight):
        """Tensors of one weight by the end of their names, and the weight they mean."""
        raise NotImplementedError


class Fbgemm(Scheme):
    """Meta's recipe for 405B: feed-forward layers only, without the first and the last."""

    def quantize(self, model):
        last = model.config.num_hidden_layers - 1
        linears = [
            name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)
        ]
        whole = re.compile(rf"lm_head|.*self_attn.*|model\.layers\.(0|{last})\..*")
        self.ignore = [name for name in linears if whole.fullmatch(name)]
        return super().quantize(model)

    def pack(self, weight):
        values, scales = to_fp8(weight)
        bound = torch.tensor([1200.0])
        return (
            {"weight": values, "weight_scale": scales, "input_scale_ub": bound},
            values.float() * scales,
        )

    def config(self):
        return {
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": self.ignore,
            "quant_method": "fbgemm_fp8",
        }


class FloatChannel(Scheme):
    """FP8 with a BF16 scale for each row."""

    def pack(self, weight):
        values, scales = to_fp8(weight, torch.bfloat16)
        return {"weight": values, "weight_scale": scales}, values.float() * scales.float()

    def config(self):
        weights = arguments(8, "float", "channel")
        inputs = arguments(8, "float", "token", dynamic=True)
        return compressed_tensors("float-quantized", weights, inputs, self.ignore)


class FloatChannelExperts(FloatChannel):
    """The same for a Llama 4, whose attention and routers stay whole."""

    ignore = ["re:.*lm_head", "re:.*self_attn", "re:.*router", "re:.*vision_model"]


class IntChannel(Scheme):
    """INT8 with an F32 scale for each row."""

    def pack(self, weight):
        scales = weight.abs().amax(1, keepdim=True) / 127.5
        values = (weight / scales).round().clamp(-128, 127)
        stored = {"weight": values.to(torch.int8), "weight_scale": scales}
        return stored, values * scales

    def config(self):
        weights = arguments(8, "int", "channel")
        inputs = arguments(8, "int", "token", dynamic=True)
        return compressed_tensors("int-quantized", weights, inputs, self.ignore)


class IntGroup(Scheme):
    """INT4 with a BF16 scale for each 128 inputs; eight values to an int32, the
    first in the lowest bits, each stored plus 8."""

    group = 128

    def pack(self, weight):
        rows, columns = weight.shape
        grouped = weight.reshape(rows, columns // self.group, self.group)
        scales = (grouped.abs().amax(2) / 7.5).to(torch.bfloat16)
        wide = scales.float()[:, :, None]
        values = (grouped / wide).round().clamp(-8, 7)
        nibbles = (values + 8).to(torch.int64).reshape(rows, columns // 8, 8)
        words = (nibbles << torch.arange(0, 32, 4)).sum(2)
        stored = {
            "weight_packed": words.to(torch.int32),
            "weight_scale": scales,
            "weight_shape": torch.tensor([rows, columns]),
        }
        return stored, (values * wide).reshape(rows, columns)

    def config(self):
        weights = arguments(4, "int", "group", group=self.group)
        return compressed_tensors("pack-quantized", weights, None, self.ignore)


def to_fp8(weight, scale_type=torch.float32):
    """Rows of e4m3, and what each is multiplied by."""
    scales = (weight.abs().amax(1, keepdim=True) / FP8_MOST).to(scale_type)
    values = (weight / scales.float()).clamp(-FP8_MOST, FP8_MOST)
    return values.to(torch.float8_e4m3fn), scales


def arguments(bits, kind, strategy, group=None, dynamic=False):
    """One side of a scheme, with every key that such checkpoints carry."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": group,
        "num_bits": bits,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
        "strategy": strategy,
        "symmetric": True,
        "type": kind,
    }


def compressed_tensors(layout, weights, inputs, ignore):
    group = {
        "input_activations": inputs,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": layout,
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def replace_tensors(folder, stored, scheme):
    """Puts quantized tensors in the place of those they mean, and says so in config.json."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    replaced = {module_of(name) for name in stored}
    kept = {name: tensor for name, tensor in tensors.items() if not is_replaced(name, replaced)}
    save_file(kept | stored, path, metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": scheme.config()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def module_of(name):
    return name.rsplit(".", 1)[0]


def is_replaced(name, replaced):
    """Fused experts have no `.weight`; their module is what all experts lie in."""
    if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return any(module.startswith(f"{module_of(name)}.0.") for module in replaced)
    return module_of(name) in replaced
