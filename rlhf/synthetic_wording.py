"""The words of the demo's world: what a fact can be, and how posts and summaries put it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """A kind of fact: its values, and how posts state them, posts mislead about them and summaries claim them."""

    values: tuple[str, ...]
    statements: tuple[str, ...]
    decoys: tuple[str, ...]
    claims: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SLOTS = {
    "who": Slot(
        values=_words("roommate brother sister boss neighbor cousin girlfriend boyfriend landlord coworker"),
        statements=(
            "the problem is my {}.",
            "it all started because of my {}.",
            "i got into a fight with my {}.",
            "this is about my {}.",
        ),
        decoys=("my {} stayed out of it.", "my {} has a new job.", "luckily my {} was away."),
        claims=("trouble with my {}", "fight with my {}", "my {} is the problem"),
    ),
    "thing": Slot(
        values=_words("laptop phone car bike guitar camera jacket wallet ring piano"),
        statements=(
            "it was over a {}.",
            "the {} got broken.",
            "we were arguing about the {}.",
            "i never got the {} back.",
        ),
        decoys=("my old {} still works fine.", "i also bought a {} last year.", "i do not care about my {}."),
        claims=("over a {}", "about the {}"),
    ),
    "place": Slot(
        values=_words("boston chicago denver dallas austin miami london paris"),
        statements=("it happened in {}.", "we were in {} when it happened.", "this was back in {}."),
        decoys=("i grew up in {}.", "my mom lives in {}.", "i once drove to {}."),
        claims=("in {}", "back in {}"),
    ),
    "day": Slot(
        values=_words("monday tuesday wednesday thursday friday saturday sunday"),
        statements=("it happened on {}.", "this was on {}.", "on {} it finally blew up."),
        decoys=("i work every {}.", "the weather was nice last {}.", "i have an exam next {}."),
        claims=("on {}", "that {}"),
    ),
    "cost": Slot(
        values=_words("40 60 90 150 200 300 500 700"),
        statements=("it cost me {} dollars.", "i am out {} dollars now.", "fixing it took {} dollars."),
        decoys=("i make {} dollars a week.", "rent here is {} dollars.", "i once won {} dollars."),
        claims=("lost {} dollars", "out {} dollars"),
    ),
    "feeling": Slot(
        values=_words("angry sad scared ashamed confused guilty jealous lonely"),
        statements=("now i feel {}.", "i am so {} about it.", "honestly it left me {}."),
        decoys=("my dog looked {}.", "my mom is always {}.", "her kids were {} too."),
        claims=("feeling {}", "now {}"),
    ),
    "plan": Slot(
        values=_words("leave wait apologize sue quit forgive complain move"),
        statements=("should i {}?", "part of me wants to {}.", "do you think i should {}?"),
        decoys=("my dad told me not to {}.", "some people just {}.", "i would never {}."),
        claims=("should i {}", "thinking i might {}"),
    ),
}
SMALL_TALK = (
    "sorry for the long post.",
    "throwaway because friends use this site.",
    "i do not know where to begin.",
    "anyway here we are.",
    "thanks for reading.",
    "english is not my first language.",
    "i hope this makes sense.",
)
OPENINGS = (
    "so this is a long story but",
    "so sorry ahead of time for the rant but",
    "so i am not sure where to start but",
)
CLOSINGS = (
    "anyway any advice would really help me out",
    "anyway thanks so much for reading all of this",
    "anyway i know it sounds silly but it matters",
)
TITLES = (
    "trouble with my {who}",
    "my {who} and the {thing}",
    "what to do about my {who}",
    "need advice about a {thing}",
    "long story about a {thing}",
)
SUBREDDITS = {
    "legaladvice": ("roommate", "landlord", "neighbor"),
    "jobs": ("boss", "coworker"),
    "family": ("brother", "sister", "cousin"),
    "relationships": ("girlfriend", "boyfriend"),
}
