"""The TL;DR format: one canonical form, whole round trips, cuts that spare header and marker."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from rlhf.prompt import (
    TRLX_START,
    Post,
    decode_response,
    encode_prompt,
    encode_response,
    encode_text,
    parse_prompt,
    parse_summary,
    render_prompt,
)
from rlhf.tokenizer import load_tokenizer, train_tokenizer

FRAGMENTS = [
    *(
        "word",
        "I said.",
        "Why?",
        "POST:",
        "TL;DR:",
        "TITLE: x",
        "SUBREDDIT: r/b",
        "r/",
        "/r/",
        "\n",
        "\r\n",
        "\r",
        "\n\n",
    ),
    *(
        " ",
        "  ",
        "\t",
        "é",
        "北京",
        "🙂🏽",
        "e\u0301",
        "\u2028",
        "\x85",
        "\xa0",
        "\x0b",
        "<|endoftext|>",
        "<|pad|>",
        "{}",
        "%s",
        "\\n",
    ),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    texts = ["SUBREDDIT: r/test\nTITLE: A short title\nPOST: My cat sat on the mat. It was warm.\nTL;DR: cat sat"] * 3
    return train_tokenizer(texts, vocab_size=300)


def weird_text(draw: random.Random, most: int = 12) -> str:
    return "".join(draw.choice(FRAGMENTS) for _ in range(draw.randint(0, most)))


def weird_posts(count: int, most: int = 12) -> list[Post]:
    draw = random.Random(7)
    return [Post(weird_text(draw, 4), weird_text(draw, 6), "x" + weird_text(draw, most) + "y") for _ in range(count)]


def test_a_prompt_is_rendered_in_four_lines() -> None:
    post = Post(subreddit="tifu", title="by sleeping", body="I slept.\n\nLong.")
    assert render_prompt(post) == "SUBREDDIT: r/tifu\nTITLE: by sleeping\nPOST: I slept.\n\nLong.\nTL;DR:"
    assert post.id == hashlib.sha256(render_prompt(post).encode()).hexdigest()


@pytest.mark.parametrize("ending", ["", "\n", "\nTL;DR:", "\nTL;DR: ", "\nTL;DR:\n", "\r\nTL;DR: "])
def test_all_copies_of_a_prompt_are_one_post(ending: str) -> None:
    assert parse_prompt(f"SUBREDDIT: r/tifu\r\nTITLE: A\nPOST: one\r\ntwo{ending}") == Post("tifu", "A", "one\ntwo")


def test_the_title_may_be_empty_and_labels_may_lack_a_space() -> None:
    assert parse_prompt("SUBREDDIT: r/news\nTITLE: \nPOST: text\nTL;DR:") == Post("news", "", "text")
    assert parse_prompt("SUBREDDIT:r/news\nTITLE:\nPOST:text") == Post("news", "", "text")


def test_the_labels_inside_a_text_are_text() -> None:
    post = parse_prompt("SUBREDDIT: r/a\nTITLE: POST: no\nPOST: see\nTL;DR: mine\nPOST: more\nTL;DR:")
    assert post == Post("a", "POST: no", "see\nTL;DR: mine\nPOST: more")


def test_a_post_is_canonical_however_it_is_made() -> None:
    post = Post(subreddit=" /r/tifu ", title=" two\r\nlines ", body="\n body\r\nmore \nTL;DR:\n")
    assert (post.subreddit, post.title, post.body) == ("tifu", "two lines", "body\nmore")


def test_weird_posts_survive_render_and_parse() -> None:
    for post in weird_posts(500):
        assert parse_prompt(render_prompt(post)) == post
        assert parse_prompt(render_prompt(post).removesuffix("TL;DR:")) == post
        assert Post(post.subreddit, post.title, post.body) == post


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "line 1 does not begin with SUBREDDIT:"),
        ("TITLE: a\nPOST: b", "line 1 does not begin with SUBREDDIT:"),
        ("SUBREDDIT: r/a\nPOST: b", "line 2 does not begin with TITLE:"),
        ("SUBREDDIT: r/a\nTITLE: b", "line 3 does not begin with POST:"),
        ("SUBREDDIT: r/a\nTITLE: b\n\nPOST: c", "line 3 does not begin with POST:"),
        ("SUBREDDIT: r/a\nTITLE: b\nPOST: \nTL;DR:", "the post is empty"),
        ("SUBREDDIT: r/a\nTITLE: b\nPOST: half \ud83d", "a lone surrogate"),
    ],
)
def test_what_is_no_prompt_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_prompt(text)


@pytest.mark.parametrize(
    "text", ["went well", " went well ", "TL;DR: went well", "TL;DR:went well\r\n", "\nTL;DR: went well"]
)
def test_all_copies_of_a_summary_are_one(text: str) -> None:
    assert parse_summary(text) == "went well"


def test_a_prompt_that_fits_is_not_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    post = Post("test", "A short title", "My cat sat.")
    ids = encode_text(tokenizer, render_prompt(post))
    whole = encode_prompt(tokenizer, post, max_tokens=len(ids))
    assert (whole.ids, whole.cut_tokens) == (ids, 0)
    assert tokenizer.decode(ids) == render_prompt(post)


def test_a_cut_spares_header_and_marker_and_fits(tokenizer: PreTrainedTokenizerBase) -> None:
    draw = random.Random(3)
    cuts = 0
    for post in weird_posts(200, most=200):
        header = f"SUBREDDIT: r/{post.subreddit}\nTITLE: {post.title}\nPOST: "
        max_tokens = len(encode_text(tokenizer, header + "\nTL;DR:")) + draw.randint(8, 120)
        full = encode_text(tokenizer, render_prompt(post))
        encoded = encode_prompt(tokenizer, post, max_tokens=max_tokens)
        text = tokenizer.decode(encoded.ids)
        assert len(encoded.ids) <= max_tokens
        assert encoded.cut_tokens == len(full) - len(encoded.ids)
        assert text.startswith(header)
        assert text.endswith("\nTL;DR:")
        assert post.body.startswith(text[len(header) : -len("\nTL;DR:")])
        cuts += encoded.cut_tokens > 0
    assert cuts > 100


def cut_body(tokenizer: PreTrainedTokenizerBase, body: str, fitting: str) -> str:
    """What is left of a body when there is room for `fitting` and the marker."""
    room = len(encode_text(tokenizer, f"SUBREDDIT: r/a\nTITLE: b\nPOST: {fitting}\nTL;DR:"))
    text = tokenizer.decode(encode_prompt(tokenizer, Post("a", "b", body), max_tokens=room).ids)
    return text.removeprefix("SUBREDDIT: r/a\nTITLE: b\nPOST: ").removesuffix("\nTL;DR:")


def test_a_cut_prefers_a_near_newline_then_a_sentence_then_a_space(tokenizer: PreTrainedTokenizerBase) -> None:
    tail = " and on it goes, farther and farther" * 3
    lines = "First thing. Second thing said here.\nThird! Fou"
    assert cut_body(tokenizer, lines + "rth" + tail, lines) == "First thing. Second thing said here."
    sentences = "First thing. Second thing said here. Thi"
    assert cut_body(tokenizer, sentences + "rd" + tail, sentences) == "First thing. Second thing said here."
    words = "one two three four five six seven eight nin"
    assert cut_body(tokenizer, words + "ety" + tail, words) == "one two three four five six seven eight"
    assert cut_body(tokenizer, "x" * 200, "x" * 40) == "x" * 40


def test_a_border_far_back_does_not_cost_the_post(tokenizer: PreTrainedTokenizerBase) -> None:
    fitting = "Hi.\n" + "one two three four five six seven eight nine ten"
    assert cut_body(tokenizer, fitting + " eleven twelve" * 5, fitting) == fitting


def test_a_full_stop_inside_a_number_is_no_border(tokenizer: PreTrainedTokenizerBase) -> None:
    fitting = "it cost me about three and 3.5"
    assert cut_body(tokenizer, fitting + "7 dollars" * 20, fitting) == "it cost me about three and"


@pytest.mark.timeout(60)
def test_a_sentence_end_right_behind_what_fits_is_no_endless_loop(tokenizer: PreTrainedTokenizerBase) -> None:
    """。 needs no space behind it, so the sentence that it ends can be one character too long, again and again."""
    post = Post("a", "b", "猫が歌う。犬も歌う。" * 8)
    header = len(encode_text(tokenizer, "SUBREDDIT: r/a\nTITLE: b\nPOST: \nTL;DR:"))
    for room in range(header + 4, header + 120):
        encoded = encode_prompt(tokenizer, post, max_tokens=room)
        assert len(encoded.ids) <= room
        assert encoded.cut_tokens > 0


def test_a_header_without_room_for_the_post_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="the header leaves no room for the post in 16 tokens"):
        encode_prompt(tokenizer, Post("a", "title " * 50, "body"), max_tokens=16)


def test_a_response_is_a_space_the_summary_and_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode_response(tokenizer, "cat sat")
    assert tokenizer.decode(ids) == " cat sat<|endoftext|>"
    assert encode_response(tokenizer, "") == [tokenizer.eos_token_id]


def test_prompt_and_response_join_as_one_text(tokenizer: PreTrainedTokenizerBase) -> None:
    post = Post("test", "A", "My cat sat.")
    joined = encode_prompt(tokenizer, post, max_tokens=500).ids + encode_response(tokenizer, "cat sat")[:-1]
    assert joined == encode_text(tokenizer, render_prompt(post) + " cat sat")


def test_a_long_response_is_cut_before_its_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = encode_response(tokenizer, "My cat sat on the mat.")
    assert encode_response(tokenizer, "My cat sat on the mat.", max_tokens=5) == [*whole[:4], tokenizer.eos_token_id]
    assert encode_response(tokenizer, "My cat sat on the mat.", max_tokens=len(whole)) == whole
    with pytest.raises(ValueError, match="max_tokens=0 leaves no room for EOS"):
        encode_response(tokenizer, "cat", max_tokens=0)


def test_responses_survive_encode_and_decode(tokenizer: PreTrainedTokenizerBase) -> None:
    draw = random.Random(11)
    for _ in range(300):
        summary = parse_summary(weird_text(draw))
        assert decode_response(tokenizer, encode_response(tokenizer, summary)) == summary


def test_decoding_stops_at_the_first_eos_and_drops_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    cat, sat = encode_text(tokenizer, " cat"), encode_text(tokenizer, " sat")
    assert decode_response(tokenizer, [pad, *cat, eos, *sat, eos, pad, pad]) == "cat"
    assert decode_response(tokenizer, [*cat, *sat]) == "cat sat"


def test_text_that_spells_a_special_token_stays_text(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode_response(tokenizer, "a <|endoftext|> b <|pad|>")
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.pad_token_id not in ids
    post = Post("a", "b", "c <|endoftext|> d")
    assert tokenizer.eos_token_id not in encode_prompt(tokenizer, post, max_tokens=500).ids


def test_what_trlx_puts_before_a_prompt_is_plain_text(tokenizer: PreTrainedTokenizerBase, shared_data: Path) -> None:
    gpt2 = load_tokenizer(shared_data / "gpt2-bpe", key="model.tokenizer")
    plain = [27, 91, 9688, 1659, 5239, 91, 29]
    assert encode_text(gpt2, TRLX_START) == plain  # GPT-2's tokens < | start of text | >
    gpt2.add_special_tokens({"additional_special_tokens": [TRLX_START]})
    assert encode_text(gpt2, TRLX_START) == plain


def test_our_parts_are_the_tokens_of_trlx_text(shared_data: Path) -> None:
    """trlX tokenises prompt and summary as one text after <|startoftext|>, we each alone: GPT-2's words end there."""
    gpt2 = load_tokenizer(shared_data / "gpt2-bpe", key="model.tokenizer")
    with gzip.open(shared_data / "text" / "tldr.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(100), file, strict=False)]
    for row in rows:
        post, summary = parse_prompt(row["prompt"]), parse_summary(row["label"])
        ours = encode_text(gpt2, TRLX_START)
        ours += [*encode_prompt(gpt2, post, max_tokens=10**6).ids, *encode_response(gpt2, summary)]
        theirs = gpt2(f"{TRLX_START}{render_prompt(post)} {summary}<|endoftext|>", verbose=False)["input_ids"]
        assert ours == theirs
