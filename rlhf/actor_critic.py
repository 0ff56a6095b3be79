"""PPO's networks: the policy, its value function and its reference, over a trunk that none of them train.

Shapes: B batch, T token of prompt and response, P prompt token, R response token (T = P + R), H hidden,
V vocabulary. A row is a left-padded prompt followed by a right-padded response.
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
from rlhf.losses import token_entropy, token_logprobs
from rlhf.models import backbone, blocks, position_ids, score_shift, split_backbone


class ActorOutput(NamedTuple):
    """What a training pass gives for each response token."""

    logprobs_BR: Tensor
    entropy_BR: Tensor  # without gradient: it is only reported
    values_BR: Tensor


class ValueHead(nn.Module):
    """Two linear layers that read the policy's final hidden state; float32 whatever the policy is.

    Source: CarperAI/trlx, trlx/utils/modeling.py, make_head.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size), nn.ReLU(), nn.Linear(2 * hidden_size, 1))

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """One value a position."""
        with torch.autocast(hidden_BTH.device.type, enabled=False):
            return self.layers(hidden_BTH.float()).squeeze(-1)


class Branch(nn.Module):
    """What sits above the branch point: the top blocks, the final norm and the LM head."""

    def __init__(self, top: PreTrainedModel, lm_head: nn.Module) -> None:
        super().__init__()
        self.top = top
        self.lm_head = lm_head

    def hidden(self, trunk_BTH: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Final hidden states, from the trunk's; from the ids where the trunk is empty."""
        inputs = {"input_ids": ids_BT}
        if trunk_BTH.shape[-1]:
            inputs = {"inputs_embeds": trunk_BTH.to(self.top.dtype)}
        return _run(self.top, mask_BT, **inputs)

    def logits(self, hidden_BRH: Tensor) -> Tensor:
        """Next-token logits at the given positions only."""
        return self.lm_head(hidden_BRH)


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

    @torch.no_grad()
    def trunk_states(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Hidden states at the branch point, to be computed once a rollout; of width 0 without a trunk."""
        trunk, _ = self._views
        if trunk is None:
            return torch.empty(*ids_BT.shape, 0, device=ids_BT.device)
        return _run(trunk, mask_BT, input_ids=ids_BT)

    def forward(self, trunk_BTH: Tensor, ids_BT: Tensor, mask_BT: Tensor, response_start: int) -> ActorOutput:
        """Log-probability, entropy and value at each response token, with gradients above the trunk.

        Column r speaks of token ids_BT[:, response_start + r] and reads the hidden state one before it,
        where that token is chosen.
        """
        _, branch = self._views
        choosing = slice(response_start - 1, ids_BT.shape[1] - 1)
        hidden_BRH = branch.hidden(trunk_BTH, ids_BT, mask_BT)[:, choosing]
        logits_BRV = branch.logits(hidden_BRH)
        return ActorOutput(
            logprobs_BR=token_logprobs(logits_BRV, ids_BT[:, response_start:], temperature=self.temperature),
            entropy_BR=token_entropy(logits_BRV.detach(), temperature=self.temperature),
            values_BR=self._values(hidden_BRH, ids_BT, mask_BT, choosing),
        )

    @torch.no_grad()
    def reference_logprobs(self, trunk_BTH: Tensor, ids_BT: Tensor, mask_BT: Tensor, response_start: int) -> Tensor:
        """Log-probability of each response token under the frozen reference."""
        with self._reference_branch() as reference:
            hidden_BTH = reference.hidden(trunk_BTH, ids_BT, mask_BT)
            logits_BRV = reference.logits(hidden_BTH[:, response_start - 1 : -1])
        return token_logprobs(logits_BRV, ids_BT[:, response_start:], temperature=self.temperature)

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

    def _values(self, hidden_BRH: Tensor, ids_BT: Tensor, mask_BT: Tensor, choosing: slice) -> Tensor:
        if isinstance(self.value_head, ValueHead):
            return self.value_head(hidden_BRH)
        hidden_BTH = _run(backbone(self.value_head), mask_BT, input_ids=ids_BT)
        return self.value_head.score(hidden_BTH[:, choosing]).squeeze(-1).float() - score_shift(self.value_head)

    @torch.no_grad()
    def _check_split(self) -> None:
        """Compare four tokens with the whole policy.

        Some architectures scale embeddings or logits outside the parts we take: better found here than
        as a wrong KL hours later.
        """
        _, branch = self._views
        ids_BT = torch.arange(4, device=self.policy.device).unsqueeze(0)
        mask_BT = torch.ones_like(ids_BT)
        was_training = self.policy.training
        self.policy.eval()
        whole = self.policy(ids_BT, attention_mask=mask_BT, use_cache=False).logits
        parts = branch.logits(branch.hidden(self.trunk_states(ids_BT, mask_BT), ids_BT, mask_BT))
        self.policy.train(was_training)
        tolerance = (1e-4 if whole.dtype == torch.float32 else 5e-2) * whole.abs().max()
        if (whole - parts).abs().max() > tolerance:
            raise ValueError(
                f"{type(self.policy).__name__} is not the sum of its blocks, norm and head, which PPO here relies "
                "on; set ppo.unfrozen_layers: all, or choose another model.base"
            )


def _run(body: PreTrainedModel, mask_BT: Tensor, **inputs: Tensor) -> Tensor:
    """Last hidden state of a backbone or a view of one."""
    output = body(attention_mask=mask_BT, position_ids=position_ids(mask_BT), use_cache=False, **inputs)
    return output.last_hidden_state


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
