"""RLHF for summarisation: supervised fine-tuning, a reward model, PPO and an evaluation."""

__version__ = "0.1.0"
