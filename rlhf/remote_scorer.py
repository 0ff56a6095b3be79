"""PPO's rollouts scored by the service's `POST /score`: a `Scorer` without a model.

What is scored are the very tokens that were sampled, by this run's own reward model: the service tells the fingerprint
of the one that it has with every answer, and another is refused.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoint import fingerprint
from rlhf.config import Config
from rlhf.errors import ConfigError, DataError, RlhfError
from rlhf.placement import service_url
from rlhf.runtime import agreed
from rlhf.service_client import Patience, Refused, ServiceAway, ServiceClient

logger = logging.getLogger(__name__)

PARALLEL_REQUESTS = 4
"""Under way at once, so that several replicas behind one address have work."""

SHOWN_DIGITS = 16
TOO_LARGE, MALFORMED = 413, 422
REMEDIES = {
    401: "put a key that the service knows into the file that ppo.remote.api_key_file names",
    403: "put a key that the service knows into the file that ppo.remote.api_key_file names",
    404: "ppo.remote.url has to be the address of the service, to which /score is added",
    TOO_LARGE: "raise APP_MAX_BODY_BYTES of the service",
    MALFORMED: "the service has to be of this release, and serve this run",
}

Ids = tuple[int, ...]


class ScorerAway(RlhfError):
    """No scores for now; what has been scored is remembered. Ask again for the same sequences, later."""

    exit_code = ServiceAway.exit_code


class RemoteScorer:
    """Scores token sequences as `rlhf.scoring.Scorer` does, by asking a service."""

    def __init__(
        self,
        client: ServiceClient,
        *,
        checksum: str,
        items_per_request: int,
        retry_seconds: float,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """checksum is `rlhf.checkpoint.fingerprint` of the reward model that has to answer.

        After retry_seconds without any answer, or once `stopped` says so, the tries end.
        """
        self._client = client
        self._checksum = checksum
        self._items_per_request = items_per_request
        self._retry_seconds = retry_seconds
        self._stopped = stopped
        self._known: dict[Ids, float] = {}

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        on_progress: Callable[[int], None] | None = None,
        allow_nonfinite: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """One score a sequence: [B] float32 on the CPU, in the order given; equal sequences are asked for once.

        on_progress hears now and then how many are done; once `stopped` is true, the tries end. Raises ScorerAway
        while the service cannot be reached or has no room, ConfigError or DataError for what it will not do later
        either, and RlhfError for a score that is not finite, unless allow_nonfinite gives NaN for it.
        """
        wanted = [tuple(sequence) for sequence in sequences]
        counts = Counter(wanted)
        missing = [ids for ids in counts if ids not in self._known]
        done = len(wanted) - sum(counts[ids] for ids in missing)
        for batch in self._answered(missing, lambda: stopped() or self._stopped()):
            done += sum(counts[ids] for ids in batch)
            if on_progress is not None:
                on_progress(done)
        scores_B = torch.tensor([self._known[ids] for ids in wanted], dtype=torch.float32)
        self._known.clear()
        wrong = int((~scores_B.isfinite()).sum())
        if wrong and not allow_nonfinite:
            raise RlhfError(
                f"the reward model's score is not finite for {wrong} of {len(wanted)} sequences; train it again, or "
                "serve it with APP_PRECISION=float32"
            )
        return scores_B

    def _answered(self, missing: Sequence[Ids], stopped: Callable[[], bool]) -> Iterator[Sequence[Ids]]:
        """Batches as they are answered, in any order; their scores are known then."""
        size, patience = self._items_per_request, Patience(self._retry_seconds, stopped)
        batches = [missing[start : start + size] for start in range(0, len(missing), size)]
        with ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="score") as pool:
            futures = {pool.submit(self._ask, batch, patience): batch for batch in batches}
            try:
                for future in as_completed(futures):
                    future.result()
                    yield futures[future]
            except ServiceAway as error:
                raise ScorerAway(f"{error}; {len(self._known)} scores are known") from error
            finally:
                patience.end()
                for future in futures:
                    future.cancel()

    def _ask(self, batch: Sequence[Ids], patience: Patience) -> None:
        try:
            answer = self._client.post("/score", {"items": [{"token_ids": ids} for ids in batch]}, patience)
        except Refused as refusal:
            if len(batch) == 1 or not _is_too_large(refusal):
                raise self._explained(refusal) from refusal
            half = len(batch) // 2
            logger.info("%s: %s; asking for %d at a time from now on", self._client.url, refusal, half)
            self._items_per_request = min(self._items_per_request, half)
            for part in (batch[:half], batch[half:]):
                self._ask(part, patience)
        else:
            self._known.update(zip(batch, self._scores_in(answer, len(batch)), strict=True))

    def _scores_in(self, answer: Any, count: int) -> list[float]:
        """The scores of an answer; null is one that is not finite, which JSON cannot say."""
        try:
            checksum, scores = answer["checksum"], [result["score"] for result in answer["results"]]
            found = [math.nan if score is None else float(score) for score in scores]
        except (KeyError, TypeError, ValueError) as error:
            raise self._no_service() from error
        if checksum != self._checksum:
            raise ConfigError(
                f"{self._client.url} scores with the reward model {str(checksum)[:SHOWN_DIGITS]} (run "
                f"{str(answer.get('run'))[:100]!r}), and this run's is {self._checksum[:SHOWN_DIGITS]}; serve this "
                "run's reward/final, or name the service that does in ppo.remote.url"
            )
        if len(found) != count:
            raise self._no_service()
        return found

    def _no_service(self) -> ConfigError:
        return ConfigError(
            f"{self._client.url} does not answer as the service of this release does; name one that does in "
            "ppo.remote.url"
        )

    def _explained(self, refusal: Refused) -> RlhfError:
        remedy = REMEDIES.get(refusal.status, "look at ppo.remote and at what stands at that address")
        kind = DataError if refusal.status == MALFORMED else ConfigError
        return kind(f"{self._client.url}/score answers {refusal}; {remedy}")


def keep_trying(attempt: Callable[[], Tensor | None], *, heed: Callable[[], None]) -> Tensor:
    """The scores of this process's sequences, once attempt gives them; it may give None, or raise ScorerAway.

    All processes of the stage have to call it together, also one that has no sequences, and go on together once each
    has its scores. heed is called on all of them after every attempt in vain: to show life, and to raise on all what
    ends the stage when it is asked to stop.
    """
    scores_B = None
    while True:
        try:
            if scores_B is None:
                scores_B = attempt()
        except ScorerAway as error:
            logger.warning("waiting for the scorer: %s", error)
        if not agreed(scores_B is None):
            assert scores_B is not None
            return scores_B
        heed()


def open_remote_scorer(
    config: Config, reward_dir: Path, *, stopped: Callable[[], bool] = lambda: False
) -> RemoteScorer:
    """The scorer that `ppo.remote` describes, for the reward model published in reward_dir; does not connect yet.

    Raises ConfigError when `ppo.remote` does not name a service.
    """
    remote = config.ppo.remote
    client = ServiceClient(
        service_url(remote),
        api_key_file=remote.api_key_file,
        timeout_seconds=remote.timeout_seconds,
        connections=PARALLEL_REQUESTS,
    )
    return RemoteScorer(
        client,
        checksum=fingerprint(reward_dir),
        items_per_request=remote.items_per_request,
        retry_seconds=remote.retry_seconds,
        stopped=stopped,
    )


def _is_too_large(refusal: Refused) -> bool:
    """Whether fewer items may do: the body, their number, or their tokens together are too many, and no single one."""
    named = any(field.startswith("items.") for field in refusal.fields)
    return refusal.status == TOO_LARGE or (refusal.status == MALFORMED and not named)
