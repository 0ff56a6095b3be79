"""ROUGE of summaries, without the network.

`evaluate.load("rouge")` fetches a script when it is called; clusters and CI cannot. `OfflineRouge` is the same
kind of object, an `evaluate.Metric` over `rouge_score`, but lives here.

No stemming by default, as in `evaluate` and in the trlX summarize example, so that numbers can be compared with
theirs. Papers that report ROUGE-1.5.5 with `-m` mean `use_stemmer=True`.

ROUGE-Lsum takes one sentence a line, which is how `rouge_score` reads it; a summary without line breaks is one
sentence, and its ROUGE-Lsum then equals its ROUGE-L.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge_scores(
    predictions: Sequence[str], references: Sequence[str], *, use_stemmer: bool = False
) -> dict[str, list[float]]:
    """F-measure of each prediction against its reference: a list a ROUGE type, in input order, from 0 to 1.

    An empty prediction or reference scores 0. Raises ValueError when the two differ in number.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give one for each")
    scorer = RougeScorer(ROUGE_TYPES, use_stemmer=use_stemmer)
    scores: dict[str, list[float]] = {name: [] for name in ROUGE_TYPES}
    for prediction, reference in zip(predictions, references, strict=True):
        pair = scorer.score(target=reference, prediction=prediction)
        for name in ROUGE_TYPES:
            scores[name].append(float(pair[name].fmeasure))
    return scores


class OfflineRouge(evaluate.Metric):
    """ROUGE as an `evaluate.Metric`: no download, no file left behind, no cache directory.

    `compute(predictions=, references=, use_stemmer=False, use_aggregator=True)` gives the means, or with
    `use_aggregator=False` the list that `rouge_scores` gives.
    """

    def __init__(self) -> None:
        # The base class insists on making a cache directory. Held in memory, nothing is ever written to it.
        with tempfile.TemporaryDirectory(prefix="rouge-") as scratch:
            super().__init__(cache_dir=scratch, keep_in_memory=True, seed=0)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE-1, -2, -L and -Lsum F-measure by rouge_score.",
            citation="Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
            inputs_description="predictions and references: one text each; sentences on lines of their own.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self,
        *,
        predictions: Sequence[str],
        references: Sequence[str],
        use_stemmer: bool = False,
        use_aggregator: bool = True,
    ) -> dict[str, float] | dict[str, list[float]]:
        scores = rouge_scores(predictions, references, use_stemmer=use_stemmer)
        if use_aggregator:
            return {name: sum(values) / len(values) for name, values in scores.items()}
        return scores
