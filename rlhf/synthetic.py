"""The demo's world: posts with known facts, writers with bad habits, judges who err.

A post states four or five facts, each in one of several wordings and in any order, amid small talk and sentences
that name other people, days or prices; often an edit answers what readers asked about it. Its reference summary is
by one of three writers: the chatty one opens and closes with words about nothing and leaves half the facts out, the
hasty one stops early, the careful one states all; each mistakes a fact at times. Judges compare summaries by
`gold_score` and err at a known rate. Everything is drawn from one seed.

What only evaluation may see is in `extra`: a post's `facts`; a comparison's `gold_chosen`, `gold_rejected` and
`flipped`, which says that the judge erred.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlhf.config import SyntheticConfig
from rlhf.data import Comparison, Example
from rlhf.prompt import Post
from rlhf.synthetic_wording import CLOSINGS, OPENINGS, SLOTS, SMALL_TALK, SUBREDDITS, TITLES, Slot

SOURCE = "synthetic"
FREE_WORDS_PER_FACT = 4
WORST_SCORE = -100.0
_CORE = ("who", "thing")


@dataclass(frozen=True)
class Writer:
    """A habit of summarising; the facts stated are all where `facts` is None, else one of these numbers."""

    share: float
    facts: tuple[int, ...] | None
    opens: float
    closes: float
    mistakes: float


@dataclass(frozen=True)
class Story:
    """A post, its facts by slot, and the misleading values it also names."""

    post: Post
    facts: dict[str, str]
    decoys: dict[str, str]


@dataclass(frozen=True)
class Candidate:
    """A summary to be judged; origin is `writers`, or `altered` for one made to be good or bad in a known way."""

    summary: str
    origin: str
    gold: float


@dataclass(frozen=True)
class SyntheticData:
    """Posts with reference summaries for train, valid and test; comparisons for train and valid."""

    posts: dict[str, list[Example]]
    comparisons: dict[str, list[Comparison]]


WRITERS = (
    Writer(share=0.45, facts=(2, 2, 3), opens=0.92, closes=0.85, mistakes=0.12),
    Writer(share=0.25, facts=(1, 2, 3), opens=0.0, closes=0.0, mistakes=0.12),
    Writer(share=0.30, facts=None, opens=0.0, closes=0.0, mistakes=0.02),
)
_SHARES = [writer.share for writer in WRITERS]
_CANDIDATES = {
    "writer": 0.55,
    "swapped": 0.12,
    "complete": 0.12,
    "omitted": 0.08,
    "invented": 0.05,
    "repeated": 0.04,
    "scrap": 0.04,
}


def _claim_pattern(slot: Slot) -> re.Pattern[str]:
    values = "|".join(slot.values)
    wordings = (re.escape(claim).replace(r"\{\}", f"({values})") for claim in slot.claims)
    return re.compile("|".join(rf"\b{wording}\b" for wording in wordings))


_CLAIM_PATTERNS = {name: _claim_pattern(slot) for name, slot in SLOTS.items()}


def generate(config: SyntheticConfig, *, seed: int) -> SyntheticData:
    """Draw all posts, reference summaries and comparisons; the same seed gives the same data.

    No two posts are the same, within a split or across splits. The training comparisons are about training
    posts, the held-out ones about validation posts, which neither SFT nor the reward model learns from.
    """
    rng = random.Random(f"synthetic {seed}")
    stories = _distinct_stories(rng)
    sizes = {"train": config.train_posts, "valid": config.valid_posts, "test": config.test_posts}
    by_split = {split: [next(stories) for _ in range(size)] for split, size in sizes.items()}
    pairs = {"train": config.train_comparisons, "valid": config.valid_comparisons}
    return SyntheticData(
        posts={split: [_example(rng, story) for story in group] for split, group in by_split.items()},
        comparisons={
            split: [_comparison(rng, rng.choice(by_split[split]), config.judge_error_rate) for _ in range(count)]
            for split, count in pairs.items()
        },
    )


def gold_score(facts: Mapping[str, str], summary: str) -> float:
    """How good a summary is, in points: 100 states every fact briefly, 0 tells nothing, -100 is the floor.

    The share of facts stated, less the share of false claims, in percent; less 1 for each word beyond four a stated
    fact. A claim is one of the wordings in `SLOTS` around one of the slot's values; it is false when the post states
    no such fact or another value, and when it repeats a claim. Any text has a score.
    """
    stated, false = count_claims(facts, summary)
    spare_words = max(0, len(summary.split()) - FREE_WORDS_PER_FACT * stated)
    return max(WORST_SCORE, 100.0 * (stated - false) / len(facts) - spare_words)


def count_claims(facts: Mapping[str, str], summary: str) -> tuple[int, int]:
    """How many of the facts a summary states, and how many false or repeated claims it makes."""
    claims = list(_claims(summary))
    stated = {slot for slot, value in claims if facts.get(slot) == value}
    return len(stated), len(claims) - len(stated)


def _claims(summary: str) -> Iterator[tuple[str, str]]:
    """Each clause that claims something: its slot and the value it gives."""
    text = summary.lower()
    for name, pattern in _CLAIM_PATTERNS.items():
        for match in pattern.finditer(text):
            yield name, next(value for value in match.groups() if value is not None)


def _distinct_stories(rng: random.Random) -> Iterator[Story]:
    seen: set[str] = set()
    while True:
        story = _story(rng)
        if story.post.id not in seen:
            seen.add(story.post.id)
            yield story


def _story(rng: random.Random) -> Story:
    others = [name for name in SLOTS if name not in _CORE]
    chosen = {*_CORE, *rng.sample(others, rng.choice((2, 3)))}
    facts = {name: rng.choice(slot.values) for name, slot in SLOTS.items() if name in chosen}
    decoys = {name: _other_value(rng, name, facts) for name in rng.sample(list(SLOTS), rng.randint(1, 3))}
    body = _body(rng, facts, decoys)
    subreddit = next(name for name, people in SUBREDDITS.items() if facts["who"] in people)
    title = rng.choice(TITLES).format(**facts)
    return Story(post=Post(subreddit=subreddit, title=title, body=body), facts=facts, decoys=decoys)


def _body(rng: random.Random, facts: dict[str, str], decoys: dict[str, str]) -> str:
    """Statements, misleading sentences and small talk in any order; half the posts begin with the person."""
    sentences = [rng.choice(SLOTS[name].statements).format(value) for name, value in facts.items()]
    sentences += [rng.choice(SLOTS[name].decoys).format(value) for name, value in decoys.items()]
    first, rest = (sentences[:1], sentences[1:]) if rng.random() < 0.5 else ([], sentences)
    rng.shuffle(rest)
    sentences = first + rest
    for talk in rng.sample(SMALL_TALK, rng.randint(0, 2)):
        sentences.insert(rng.randint(0, len(sentences)), talk)
    asked = rng.sample(list(facts), rng.randint(0, 3))
    if asked:
        sentences.append("edit:")
        sentences += [_answered_question(rng, name, facts, decoys) for name in asked]
    return " ".join(sentences)


def _answered_question(rng: random.Random, slot: str, facts: Mapping[str, str], decoys: Mapping[str, str]) -> str:
    """What readers asked, half the time about a wrong value: `in paris? no, back in boston.`"""
    claims = SLOTS[slot].claims
    if rng.random() < 0.5:
        return f"{rng.choice(claims).format(facts[slot])}? yes."
    wrong = _mistaken(rng, slot, facts, decoys)
    return f"{rng.choice(claims).format(wrong)}? no, {rng.choice(claims).format(facts[slot])}."


def _other_value(rng: random.Random, slot: str, facts: Mapping[str, str]) -> str:
    return rng.choice([value for value in SLOTS[slot].values if value != facts.get(slot)])


def _mistaken(rng: random.Random, slot: str, facts: Mapping[str, str], decoys: Mapping[str, str]) -> str:
    """A wrong value, half the time one that the post names of something else."""
    if slot in decoys and rng.random() < 0.5:
        return decoys[slot]
    return _other_value(rng, slot, facts)


def _example(rng: random.Random, story: Story) -> Example:
    writer = rng.choices(WRITERS, _SHARES)[0]
    return Example(
        post=story.post, summary=_write(rng, story, writer), source=SOURCE, extra={"facts": dict(story.facts)}
    )


def _write(rng: random.Random, story: Story, writer: Writer) -> str:
    """A summary in a writer's manner."""
    count = len(story.facts) if writer.facts is None else rng.choice(writer.facts)
    stated = rng.sample(list(story.facts), count)
    claimed = {}
    for name, value in story.facts.items():
        if name in stated:
            claimed[name] = _mistaken(rng, name, story.facts, story.decoys) if rng.random() < writer.mistakes else value
    opens, closes = rng.random() < writer.opens, rng.random() < writer.closes
    return _assemble(rng, list(claimed.items()), opens=opens, closes=closes)


def _assemble(rng: random.Random, claims: Sequence[tuple[str, str]], *, opens: bool, closes: bool) -> str:
    clauses = [rng.choice(SLOTS[name].claims).format(value) for name, value in claims]
    if closes:
        clauses.append(rng.choice(CLOSINGS))
    text = ", ".join(clauses)
    return f"{rng.choice(OPENINGS)} {text}." if opens else f"{text}."


def _comparison(rng: random.Random, story: Story, error_rate: float) -> Comparison:
    """Two summaries of different gold scores, the better one chosen unless the judge errs."""
    better, worse = _unequal_candidates(rng, story)
    flipped = rng.random() < error_rate
    chosen, rejected = (worse, better) if flipped else (better, worse)
    origins = {chosen.origin, rejected.origin}
    return Comparison(
        post=story.post,
        chosen=chosen.summary,
        rejected=rejected.summary,
        source=f"{SOURCE}-{origins.pop() if len(origins) == 1 else 'mixed'}",
        extra={"gold_chosen": chosen.gold, "gold_rejected": rejected.gold, "flipped": flipped},
    )


def _unequal_candidates(rng: random.Random, story: Story) -> tuple[Candidate, Candidate]:
    """The better one first."""
    while True:
        first, second = _candidate(rng, story), _candidate(rng, story)
        if first.gold != second.gold:
            return (first, second) if first.gold > second.gold else (second, first)


def _candidate(rng: random.Random, story: Story) -> Candidate:
    kind = rng.choices(list(_CANDIDATES), list(_CANDIDATES.values()))[0]
    if kind == "writer":
        origin, summary = "writers", _write(rng, story, rng.choices(WRITERS, _SHARES)[0])
    else:
        claims = _altered_claims(rng, story, kind)
        origin, summary = "altered", _assemble(rng, claims, opens=rng.random() < 0.1, closes=rng.random() < 0.15)
    return Candidate(summary=summary, origin=origin, gold=gold_score(story.facts, summary))


def _altered_claims(rng: random.Random, story: Story, kind: str) -> list[tuple[str, str]]:
    """All facts of a post, then spoilt in one way: what a policy under optimisation may come to write."""
    claims = list(story.facts.items())
    if kind == "swapped":
        for position in rng.sample(range(len(claims)), rng.choice((1, 1, 2))):
            slot = claims[position][0]
            claims[position] = (slot, _mistaken(rng, slot, story.facts, story.decoys))
    elif kind == "omitted":
        del claims[rng.randrange(len(claims))]
    elif kind == "invented":
        absent = [slot for slot in SLOTS if slot not in story.facts]
        invented = rng.sample(absent, rng.choice((1, 2)))
        claims += [(slot, _mistaken(rng, slot, story.facts, story.decoys)) for slot in invented]
        claims.sort(key=lambda claim: list(SLOTS).index(claim[0]))
    elif kind == "repeated":
        claims += rng.choices(claims, k=rng.choice((1, 2, 4)))
    elif kind == "scrap":
        claims = rng.sample(claims, rng.choice((0, 1)))
    else:
        assert kind == "complete", kind
    return claims
