"""Tokenizers: GPT-2's tokens, our own byte-level BPE, and a pad token that is not EOS."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer

from rlhf.errors import PrerequisiteError
from rlhf.prompt import encode_text
from rlhf.tokenizer import EOS, PAD, load_tokenizer, train_tokenizer

TEXTS = ["The cat sat on the mat.", "The cat wasn't on the mat, it's true.", "A cat! 1234"] * 5


def test_gpt2_tokens_equal_the_recorded_ones(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "gpt2-bpe", key="model.tokenizer")
    lines = (shared_data / "gpt2-bpe" / "encode_vectors.jsonl").read_text(encoding="utf-8").split("\n")
    vectors = [json.loads(line) for line in lines if line]
    assert len(vectors) == 75
    for vector in vectors:
        assert tokenizer(vector["text"])["input_ids"] == vector["ids"]
        if EOS not in vector["text"]:
            assert encode_text(tokenizer, vector["text"]) == vector["ids"]


def test_gpt2_gets_a_pad_token_after_its_own(shared_data: Path, tmp_path: Path) -> None:
    load_tokenizer(shared_data / "gpt2-bpe", key="model.tokenizer").save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert (saved.eos_token_id, saved.pad_token_id, len(saved)) == (50256, 50257, 50258)


def test_a_trained_tokenizer_has_the_asked_size_and_loses_no_text() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=270)
    assert len(tokenizer) == 270
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    for text in ("The cat", "naïve 北京 🙂🏽\r\n\t x  y", "  two"):
        assert tokenizer.decode(encode_text(tokenizer, text)) == text


def test_a_trained_tokenizer_splits_words_as_gpt2_does() -> None:
    tokenizer = train_tokenizer(TEXTS * 20, vocab_size=400)
    assert tokenizer.convert_ids_to_tokens(encode_text(tokenizer, "The cat wasn't")) == ["The", "Ġcat", "Ġwasn", "'t"]


def test_training_is_the_same_in_another_process(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, vocab_size=300).save_pretrained(tmp_path / "here")
    script = (
        "import sys; from rlhf.tokenizer import train_tokenizer\n"
        f"train_tokenizer({TEXTS!r}, vocab_size=300).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "there")], check=True)
    assert (tmp_path / "here/tokenizer.json").read_bytes() == (tmp_path / "there/tokenizer.json").read_bytes()


def test_a_saved_tokenizer_loads_beside_a_gptj_config(tmp_path: Path) -> None:
    trained = train_tokenizer(TEXTS, vocab_size=300)
    trained.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gptj"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.is_fast
    assert (loaded.eos_token, loaded.pad_token, len(loaded)) == (EOS, PAD, len(trained))
    assert loaded("The cat's hat")["input_ids"] == encode_text(trained, "The cat's hat")


def test_a_pad_token_equal_to_eos_is_replaced(tmp_path: Path) -> None:
    vocabulary = train_tokenizer(TEXTS, vocab_size=300)
    vocabulary.pad_token = EOS
    vocabulary.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == 0
    assert load_tokenizer(tmp_path, key="model.tokenizer").pad_token_id == 1


def test_a_pad_token_of_its_own_is_kept(tmp_path: Path) -> None:
    other = GPT2Tokenizer(vocab={EOS: 0, "[PAD]": 1, "a": 2}, merges=[], pad_token="[PAD]")
    other.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, key="model.tokenizer")
    assert (loaded.pad_token, len(loaded)) == ("[PAD]", 3)


def test_a_directory_without_tokenizer_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match=f"^model.base={tmp_path} holds no tokenizer: neither tokenizer.json"):
        load_tokenizer(tmp_path, key="model.base")


def test_a_damaged_tokenizer_is_one_line(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, vocab_size=300).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    with pytest.raises(PrerequisiteError, match="its tokenizer cannot be loaded") as raised:
        load_tokenizer(tmp_path, key="model.tokenizer")
    assert "\n" not in str(raised.value)


def test_a_spare_entry_becomes_the_pad_token(tmp_path: Path) -> None:
    """GPT-J's tokenizer names every row of its embeddings; one more token would need a larger matrix."""
    tokenizer = train_tokenizer(["some text to learn from"] * 10, vocab_size=300)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|extratoken_1|>", "<|extratoken_2|>"]})
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, key="model.tokenizer")
    assert loaded.pad_token == "<|extratoken_2|>"
    assert len(loaded) == len(tokenizer)
