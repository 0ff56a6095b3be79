"""What rlhf says of a run without any service, one sequence at a time: the service must say the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf.generation import BuiltinEngine
from rlhf.models import load_policy, load_reward_model
from rlhf.prompt import EncodedPrompt, Post, decode_response, encode_prompt, encode_response
from rlhf.sampling import Sampling
from rlhf.scoring import Scorer
from rlhf.slots import Request
from rlhf.tokenizer import load_tokenizer
from tests.served_run import MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS

GREEDY = Sampling(max_new_tokens=MAX_RESPONSE_TOKENS, temperature=0.0)


@dataclass(frozen=True)
class Written:
    """One summary, with its tokens (EOS included) and score."""

    summary: str
    tokens: list[int]
    finish: str
    score: float


class Alone:
    """The models of a run, loaded without the service."""

    def __init__(self, run_dir: Path) -> None:
        self.tokenizer = load_tokenizer(run_dir / "sft" / "final", key="test")
        eos_id, pad_id = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        self._engines = {
            name: BuiltinEngine(load_policy(run_dir / name / "final"), eos_id=eos_id, pad_id=pad_id)
            for name in ("sft", "ppo")
        }
        self._scorer = Scorer(load_reward_model(run_dir / "reward" / "final"), batch_tokens=10_000)

    def prompt(self, post: Post) -> EncodedPrompt:
        return encode_prompt(self.tokenizer, post, max_tokens=MAX_PROMPT_TOKENS)

    def write(
        self, post: Post, sampling: Sampling = GREEDY, *, model: str = "ppo", seed: int = 0, number: int = 0
    ) -> Written:
        """The summary that the service must give; number is the candidate's."""
        prompt = self.prompt(post).ids
        batch = self._engines[model].open(1)
        news = batch.add({0: Request(prompt, sampling, seed=(seed, number))})
        tokens = [new.token for new in news]
        while news[-1].finish is None:
            news = batch.step()
            tokens += [new.token for new in news]
        finish = str(news[-1].finish)
        return Written(decode_response(self.tokenizer, tokens), tokens, finish, self.of([*prompt, *tokens]))

    def score(self, post: Post, summary: str) -> float:
        return self.of([*self.prompt(post).ids, *encode_response(self.tokenizer, summary)])

    def of(self, ids: list[int]) -> float:
        """The score of a prompt and its summary, as they stand."""
        return float(self._scorer.score([ids])[0])
