"""What goes over the wire: requests, answers and events, with their limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, FailFast, Field, JsonValue, StringConstraints, Tag

PolicyName = Literal["ppo", "sft"]
Truncation = Literal["error", "body"]
FinishReason = Literal["stop", "length"]

MAX_SEED = 2**53 - 1
"""The largest whole number that JSON readers of every language keep exactly."""

MAX_CHARACTERS = 100_000
"""Of a text; far more than any model reads, and little enough to be tokenised in a moment."""

MAX_TOKEN_ID = 2**31 - 1
"""No vocabulary is larger; which ids the model knows is its own to say."""


EXAMPLE_POST: dict[str, JsonValue] = {
    "subreddit": "legaladvice",
    "title": "my neighbor and the bike",
    "body": "i got into a fight with my neighbor. the bike got broken. it happened on saturday. now i feel guilty.",
}


class Schema(BaseModel):
    """Unknown keys are an error: a misspelt option must not be ignored. Nor is "3" a number, or 1 a yes."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class PostFields(Schema):
    """A post in its parts."""

    subreddit: str = Field("", max_length=200, description="with or without r/")
    title: str = Field("", max_length=2_000, description="one line")
    body: str = Field(min_length=1, max_length=MAX_CHARACTERS, description="the text to be summarised")


RawText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_CHARACTERS)]
PostInput = Annotated[
    PostFields | RawText,
    Field(
        description="A post in its parts, or its raw text: a whole prompt that begins with SUBREDDIT:, or a body alone."
    ),
]


class SummarizeRequest(Schema):
    """Posts to be summarised, all in the same way."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"posts": [EXAMPLE_POST]}]})

    posts: Annotated[list[PostInput], FailFast()] = Field(
        min_length=1, description="answered in this order; APP_MAX_POSTS at most"
    )
    model: PolicyName = Field("ppo", description="which policy writes")
    max_new_tokens: int | None = Field(
        None, ge=1, description="tokens a summary may have; the run's prompt.max_response_tokens when absent"
    )
    temperature: float | None = Field(
        None, ge=0, le=100, description="0 is greedy; when absent 0, or 1 with best_of above 1"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="sample among the likeliest tokens of this total probability")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="the same seed gives the same summary; drawn, and told, when absent"
    )
    best_of: int = Field(
        1, ge=1, description="candidates a post, of which the reward model picks one; APP_MAX_BEST_OF at most"
    )
    return_candidates: bool = Field(False, description="give all candidates, best first")
    truncation: Truncation = Field("error", description="a post that does not fit is an error, or is cut at its body")
    return_scores: bool = Field(True, description="give the reward model's score of each summary")
    timeout_seconds: float | None = Field(
        None, gt=0, description="give up after this time; APP_TIMEOUT_SECONDS at most and when absent"
    )


class Candidate(Schema):
    """One summary of a post."""

    summary: str
    score: float | None = Field(description="the reward model's: references average 0; null when not asked for")
    finish_reason: FinishReason = Field(description="stop: the policy ended it; length: max_new_tokens did")
    completion_tokens: int = Field(description="tokens written, the end-of-text token included")


class Summary(Candidate):
    """The summary of one post."""

    index: int = Field(description="position of the post in the request")
    prompt_tokens: int = Field(description="tokens read")
    cut_tokens: int = Field(description="tokens that the body lost to make the post fit")
    candidates: list[Candidate] | None = Field(None, description="all candidates, best first, when asked for")


class DoneEvent(Schema):
    """`event: done`: the last one of a stream that went well, after a `result` (a Summary) for every post."""

    id: str = Field(description="the request's id, as in X-Request-ID and the log")
    model: PolicyName
    run: str
    step: int = Field(description="of the checkpoint that wrote the summaries")
    seed: int = Field(description="send it again for the same summaries")


class SummarizeAnswer(DoneEvent):
    """Summaries in the order of the posts."""

    results: list[Summary]


class ScoreItem(Schema):
    """A summary to be scored."""

    post: PostInput
    summary: str = Field(max_length=MAX_CHARACTERS)
    reference: str | None = Field(
        None, max_length=MAX_CHARACTERS, description="another summary of the post, to be compared with"
    )


class TokenItem(Schema):
    """A summary to be scored as the very tokens that a policy wrote, after the prompt that it read."""

    token_ids: Annotated[list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]], FailFast()] = Field(
        min_length=1,
        max_length=MAX_CHARACTERS,
        description="prompt and summary in the run's own tokens; with the end-of-text token only where it was written",
    )


def _kind_of_item(item: Any) -> str:
    in_tokens = isinstance(item, TokenItem) or (isinstance(item, dict) and "token_ids" in item)
    return "TokenItem" if in_tokens else "ScoreItem"


AnyScoreItem = Annotated[
    Annotated[ScoreItem, Tag("ScoreItem")] | Annotated[TokenItem, Tag("TokenItem")], Discriminator(_kind_of_item)
]
"""Told apart by `token_ids`, so that what is wrong with an item is told of the kind that was meant."""


class ScoreRequest(Schema):
    """Summaries to be scored by the reward model."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"items": [{"post": EXAMPLE_POST, "summary": "fought with my neighbor"}]},
                {"items": [{"token_ids": [50, 7, 201, 34]}]},
            ]
        }
    )

    items: Annotated[list[AnyScoreItem], FailFast()] = Field(
        min_length=1, description="answered in this order; APP_MAX_ITEMS at most"
    )
    truncation: Truncation = Field("error", description="a post that does not fit is an error, or is cut at its body")
    timeout_seconds: float | None = Field(
        None, gt=0, description="give up after this time; APP_TIMEOUT_SECONDS at most and when absent"
    )


class Score(Schema):
    """The score of one summary."""

    index: int = Field(description="position of the item in the request")
    score: float | None = Field(
        description="the reward model's, on which references average 0; null for token_ids whose score is no number"
    )
    reference_score: float | None = Field(description="the reference's score, when one was given")
    delta: float | None = Field(description="score minus reference_score, when a reference was given")
    prompt_tokens: int | None = Field(description="null for token_ids")
    summary_tokens: int | None = Field(description="the end-of-text token included; null for token_ids")
    cut_tokens: int = Field(description="tokens that the body lost to make the post fit")


class ScoreAnswer(Schema):
    """Scores in the order of the items."""

    id: str = Field(description="the request's id, as in X-Request-ID and the log")
    run: str
    step: int = Field(description="of the reward model")
    checksum: str = Field(description="of the reward model, as /v1/models tells it")
    results: list[Score]


class TokenEvent(Schema):
    """`event: token`: a piece of a summary, as it is written."""

    index: int = Field(description="position of the post in the request")
    candidate: int = Field(description="from 0 to best_of - 1")
    text: str


class ModelInfo(Schema):
    """A model that is being served."""

    id: Literal["ppo", "sft", "reward"]
    run: str
    stage: Literal["ppo", "sft", "reward"]
    step: int
    prompt_version: str
    parameters: int
    dtype: str
    device: str
    checksum: str = Field(description="sha256 of the checkpoint's manifest: sizes and sha256 of its files")
    engine: str | None = Field(description="builtin or vllm; null for the reward model")
    max_prompt_tokens: int
    max_new_tokens: int | None = Field(description="most tokens a summary may have; null for the reward model")


class ModelsAnswer(Schema):
    """The models that are being served."""

    models: list[ModelInfo]


class ReloadAnswer(Schema):
    """What a reload did."""

    changed: bool = Field(description="false: what is served is already what `final` names")
    models: list[ModelInfo]


class Health(Schema):
    """The answer of a probe."""

    status: Literal["ok", "starting", "draining", "failed"]
    phase: str = Field(description="what the service is doing, in words")


class FieldProblem(Schema):
    """One field that is wrong."""

    field: str = Field(description="for example posts.3.body")
    message: str


class Problem(BaseModel):
    """An error, as RFC 9457 has it: application/problem+json."""

    type: str = Field(description="address of a page that explains this kind of error")
    title: str
    status: int
    detail: str
    instance: str = Field(description="the path that was asked for")
    request_id: str
    errors: list[FieldProblem] | None = Field(None, description="the fields that are wrong, for status 422")
