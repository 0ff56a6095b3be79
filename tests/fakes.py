"""Models of a few thousand weights, and a run that is ready for `prepare`; the rest is in tiny_run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlhf.checkpoint import StageDir
from rlhf.config import TinyModelConfig
from rlhf.models import create_tiny_gptj, reward_model_from_policy
from tests.tiny_run import byte_tokenizer, fetched_run

SHAPE = TinyModelConfig(layers=2, hidden=32, heads=2, rotary_dim=8, vocab_size=260)
POSITIONS = 128
EOS_ID, PAD_ID = 256, 257


def tiny_policy(*, seed: int = 0, scale: float = 8.0) -> PreTrainedModel:
    """A GPT-J with random weights, scaled up so that it prefers some tokens to others."""
    model = create_tiny_gptj(
        SHAPE, positions=POSITIONS, vocab_size=SHAPE.vocab_size, eos_id=EOS_ID, pad_id=PAD_ID, seed=seed
    )
    return _scaled(model, scale)


def tiny_llama(*, seed: int = 0, scale: float = 8.0) -> PreTrainedModel:
    """A Llama with random weights: SDPA attention, grouped key/value heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return _scaled(LlamaForCausalLM(config).eval(), scale)


def tiny_gpt2(*, seed: int = 0, scale: float = 8.0) -> PreTrainedModel:
    """A GPT-2 with random weights: learned absolute positions, an LM head tied to the embeddings."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=SHAPE.vocab_size,
        n_positions=POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return _scaled(GPT2LMHeadModel(config).eval(), scale)


MODELS = {"gptj": tiny_policy, "llama": tiny_llama, "gpt2": tiny_gpt2}


def tiny_reward_model(policy: PreTrainedModel | None = None, *, shift: float = 0.25) -> PreTrainedModel:
    """The policy's body under a random score head; the published score is the logit minus shift."""
    with tempfile.TemporaryDirectory() as folder:
        (policy or tiny_policy()).save_pretrained(folder)
        model = reward_model_from_policy(folder, seed=1)
    model.config.score_shift = shift
    return model


def rewarded_run(runs_dir: Path) -> Path:
    """A run in which `fetch` and `reward` have finished; the reward model is random."""
    run_dir = fetched_run(runs_dir)
    with StageDir(run_dir, "reward").publish(1, final=True) as directory:
        tiny_reward_model().save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
    return run_dir


def _scaled(model: PreTrainedModel, scale: float) -> PreTrainedModel:
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2 and weight is not embeddings:
                weight.mul_(scale)
    return model
