"""Checkpoints in the layout in which trlX's summarize example publishes its GPT-Js, of a few thousand weights.

fp16, names as transformers 4.27 saved them, with its buffers: causal masks, and -1e9, which fp16 makes -inf. Nothing
but torch is imported, so that `record_trlx_reward.py` runs where that release and trlX's example are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAYERS, HIDDEN, HEADS, ROTARY, POSITIONS, ROWS = 2, 32, 2, 8, 256, 260
CONFIG: dict[str, Any] = {
    "model_type": "gptj",
    "architectures": ["GPTJForCausalLM"],
    "vocab_size": ROWS,
    "n_positions": POSITIONS,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "rotary_dim": ROTARY,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
    "tie_word_embeddings": False,
    "embd_pdrop": 0.1,
    "torch_dtype": "float16",
    "transformers_version": "4.27.4",
}


def reward_checkpoint(*, seed: int) -> dict[str, Tensor]:
    """What GPTRewardModel's state_dict holds."""
    return _random(_backbone_shapes() | {"v_head.weight": (1, HIDDEN)}, seed=seed) | _buffers()


def policy_checkpoint(*, seed: int) -> dict[str, Tensor]:
    """What a GPTJForCausalLM's state_dict holds."""
    heads = {"lm_head.weight": (ROWS, HIDDEN), "lm_head.bias": (ROWS,)}
    return _random(_backbone_shapes() | heads, seed=seed) | _buffers()


def trlx_policy_checkpoint(*, seed: int) -> dict[str, Tensor]:
    """The same as trlX's own PPO trainer saves it: a prefix, the value head and the frozen reference."""
    policy = {f"base_model.{name}": tensor for name, tensor in policy_checkpoint(seed=seed).items()}
    heads = {"v_head.0.weight": (2 * HIDDEN, HIDDEN), "v_head.0.bias": (2 * HIDDEN,), "v_head.2.weight": (1, 64)}
    frozen = {"frozen_head.decoder_blocks.0.ln_1.weight": (HIDDEN,), "frozen_head.lm_head.weight": (ROWS, HIDDEN)}
    return policy | _random(heads | frozen, seed=seed + 1)


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    """Pickle a checkpoint as torch does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)
    return path


def _backbone_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (ROWS, HIDDEN)}
    for layer in range(LAYERS):
        block: dict[str, tuple[int, ...]] = {
            "ln_1.weight": (HIDDEN,),
            "ln_1.bias": (HIDDEN,),
            **{f"attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in ("k", "v", "q", "out")},
            "mlp.fc_in.weight": (4 * HIDDEN, HIDDEN),
            "mlp.fc_in.bias": (4 * HIDDEN,),
            "mlp.fc_out.weight": (HIDDEN, 4 * HIDDEN),
            "mlp.fc_out.bias": (HIDDEN,),
        }
        shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_f.weight": (HIDDEN,), "ln_f.bias": (HIDDEN,)}
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


def _random(shapes: dict[str, tuple[int, ...]], *, seed: int) -> dict[str, Tensor]:
    """Matrices that carry signals on, norms near 1; the generator is torch's own, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.randn(shape, generator=generator)
        if ".ln_" in name and name.endswith(".weight"):
            weights[name] = 1 + 0.1 * noise
        elif len(shape) == 1:
            weights[name] = 0.1 * noise
        else:
            weights[name] = 1.5 * noise / shape[-1] ** 0.5
    return {name: tensor.half() for name, tensor in weights.items()}


def _buffers() -> dict[str, Tensor]:
    buffers: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        mask = torch.ones(POSITIONS, POSITIONS, dtype=torch.uint8).tril().view(1, 1, POSITIONS, POSITIONS)
        buffers[f"transformer.h.{layer}.attn.bias"] = mask
        buffers[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9).half()
    return buffers
