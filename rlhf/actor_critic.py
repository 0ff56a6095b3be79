"""PPO's networks: the policy, its value function and its reference, over a trunk that none of them train.

Shapes: S sequences, N tokens of all of them, K tokens that choose the next one of a response, R most of these in a
sequence, H hidden, V vocabulary. A sequence is a prompt with its response but the last token, after which nothing is
chosen; its kept tokens (see `packing`) are those before the response's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.adapters import adapters_off, add_adapters, cast_frozen
from rlhf.config import LoraConfig
from rlhf.forward import hidden_states
from rlhf.models import backbone, blocks, score_shift, split_backbone
from rlhf.packing import Packed, pack
from rlhf.vocabulary import choice_logprobs


class ActorOutput(NamedTuple):
    """What a training pass gives for each response token, 0 where a sequence has fewer than R."""

    logprobs_SR: Tensor
    entropy_SR: Tensor  # without gradient: it is only reported
    values_SR: Tensor


class ValueHead(nn.Module):
    """Two linear layers that read the policy's final hidden state; float32 whatever the policy is.

    Source: CarperAI/trlx, trlx/utils/modeling.py, make_head.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size), nn.ReLU(), nn.Linear(2 * hidden_size, 1))

    def forward(self, hidden_KH: Tensor) -> Tensor:
        """One value a position."""
        with torch.autocast(hidden_KH.device.type, enabled=False):
            return self.layers(hidden_KH.float()).squeeze(-1)


class Branch(nn.Module):
    """What sits above the branch point: the top blocks, the final norm and the LM head."""

    def __init__(self, top: PreTrainedModel, lm_head: nn.Module) -> None:
        super().__init__()
        self.top = top
        self.lm_head = lm_head

    def hidden(self, trunk_NH: Tensor, packed: Packed) -> Tensor:
        """Final hidden states of the kept tokens, from the trunk's; from the ids where the trunk is empty."""
        inputs_NH = trunk_NH.to(self.top.dtype) if trunk_NH.shape[-1] else None
        return hidden_states(self.top, packed, inputs_NH=inputs_NH)

    def logits(self, hidden_KH: Tensor) -> Tensor:
        """Next-token logits at these positions."""
        return self.lm_head(hidden_KH)


class ActorCritic(nn.Module):
    """A policy with a value function and a frozen reference that share the frozen trunk.

    With `unfrozen_layers` k, the top k blocks, the final norm and the LM head are trained (an LM head tied
    to the embeddings is untied first); the reference is a frozen copy of them. With "all", everything is
    trained, there is no trunk, and the reference is a full copy.
    With `lora`, adapters in those blocks are trained instead, everything else in the policy is frozen, and nothing is
    copied: the reference is the policy with its adapters off.
    Values come from a head on the policy, or from `value_model`, a sequence classifier trained as a whole.
    `policy` stays whole and shares its weights with this module: a generation engine that runs it sees
    every optimiser step. Trunk and reference weights are kept in frozen_dtype; when that is not float32,
    run the policy and the training pass under autocast.
    Raises ValueError when k does not fit the model or when the model does not survive the split, and ConfigError
    when it cannot take the adapters.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        *,
        unfrozen_layers: int | Literal["all"],
        temperature: float,
        value_model: PreTrainedModel | None = None,
        frozen_dtype: torch.dtype = torch.float32,
        lora: LoraConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.temperature = temperature
        adapters = lora if lora is not None and lora.rank is not None else None
        trunk, top = None, backbone(policy)
        if unfrozen_layers != "all":
            trunk, top = split_backbone(top, unfrozen_layers)
        if adapters is not None:
            add_adapters(policy, adapters, key="ppo", top_layers=len(blocks(top)), seed=seed)
        elif trunk is not None:
            _train_top(policy, top)
        else:
            policy.requires_grad_(True)
        branch = Branch(top, policy.get_output_embeddings())
        # A tuple hides these views from nn.Module: their weights are registered once, as the policy's.
        self._views = (trunk, branch)
        self._check_split()
        self.reference: Branch | None = None
        if adapters is None:
            self.reference = copy.deepcopy(branch).requires_grad_(False).eval()
            for frozen in (trunk, self.reference):
                _cast_parameters(frozen, frozen_dtype)
        else:
            cast_frozen(policy, frozen_dtype)
        if value_model is not None:
            value_model.requires_grad_(True)
            self.value_head: ValueHead | PreTrainedModel = value_model
        else:
            self.value_head = ValueHead(policy.config.hidden_size).to(policy.device)

    @property
    def trunk_layers(self) -> int:
        """How many blocks the trunk has."""
        trunk, _ = self._views
        return len(blocks(trunk)) if trunk is not None else 0

    @torch.no_grad()
    def trunk_states(self, packed: Packed) -> Tensor:
        """Hidden states at the branch point, trunk_NH, to be computed once a rollout; of width 0 without a trunk."""
        trunk, _ = self._views
        if trunk is None:
            return torch.empty(len(packed.ids_N), 0, device=packed.ids_N.device)
        return hidden_states(trunk, packed.whole())

    def forward(self, trunk_NH: Tensor, packed: Packed, tokens_K: Tensor) -> ActorOutput:
        """Log-probability, entropy and value of each response token, with gradients above the trunk.

        tokens_K are the responses' tokens, each chosen at the kept token of the same number.
        """
        _, branch = self._views
        hidden_KH = branch.hidden(trunk_NH, packed)
        logprobs_K, entropy_K = choice_logprobs(branch.logits(hidden_KH), tokens_K, temperature=self.temperature)
        values_K = self._values(hidden_KH, packed)
        return ActorOutput(*(packed.per_sequence(found_K) for found_K in (logprobs_K, entropy_K, values_K)))

    @torch.no_grad()
    def reference_logprobs(self, trunk_NH: Tensor, packed: Packed, tokens_K: Tensor) -> Tensor:
        """Log-probability of each response token under the frozen reference: [S, R]."""
        with self._reference_branch() as reference:
            logits_KV = reference.logits(reference.hidden(trunk_NH, packed))
        logprobs_K, _ = choice_logprobs(logits_KV, tokens_K, temperature=self.temperature)
        return packed.per_sequence(logprobs_K)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves: the policy's branch and the value function."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @contextmanager
    def _reference_branch(self) -> Iterator[Branch]:
        """The frozen copy; with adapters the policy's own branch, while they are off."""
        if self.reference is not None:
            yield self.reference
            return
        _, branch = self._views
        with adapters_off(branch):
            yield branch

    def _values(self, hidden_KH: Tensor, packed: Packed) -> Tensor:
        if isinstance(self.value_head, ValueHead):
            return self.value_head(hidden_KH)
        hidden_KH = hidden_states(backbone(self.value_head), packed)
        return self.value_head.score(hidden_KH).squeeze(-1).float() - score_shift(self.value_head)

    @torch.no_grad()
    def _check_split(self) -> None:
        """Compare four tokens with the whole policy.

        Some architectures scale embeddings or logits outside the parts we take: better found here than
        as a wrong KL hours later.
        """
        _, branch = self._views
        packed = pack([range(4)], keep=4).to(self.policy.device)
        ids_ST = packed.ids_N.unsqueeze(0)
        was_training = self.policy.training
        self.policy.eval()
        whole = self.policy(ids_ST, attention_mask=torch.ones_like(ids_ST), use_cache=False).logits
        parts = branch.logits(branch.hidden(self.trunk_states(packed), packed))
        self.policy.train(was_training)
        tolerance = (1e-4 if whole.dtype == torch.float32 else 5e-2) * whole.abs().max()
        if (whole - parts).abs().max() > tolerance:
            raise ValueError(
                f"{type(self.policy).__name__} is not the sum of its blocks, norm and head, which PPO here relies "
                "on; set ppo.unfrozen_layers: all, or choose another model.base"
            )


def _train_top(policy: PreTrainedModel, top: PreTrainedModel) -> None:
    """Train a view's blocks and norm and the LM head, and nothing else of the policy."""
    _untie_lm_head(policy)
    policy.requires_grad_(False)
    top.requires_grad_(True)
    policy.get_output_embeddings().requires_grad_(True)


def _untie_lm_head(policy: PreTrainedModel) -> None:
    """Give the LM head weights of its own where it shares the embeddings', which stay frozen."""
    head = policy.get_output_embeddings()
    if head.weight is not policy.get_input_embeddings().weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    policy.config.tie_word_embeddings = False  # so that a saved policy keeps both
    policy.all_tied_weights_keys = {}


def _cast_parameters(module: nn.Module | None, dtype: torch.dtype) -> None:
    """Change the parameters in place; buffers such as rotary frequencies keep their precision."""
    for parameter in module.parameters() if module is not None else ():
        parameter.data = parameter.data.to(dtype)
