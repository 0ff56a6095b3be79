"""Inputs that are in order, and a few that once were trouble, for each reader."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import struct
from pathlib import Path
from typing import Any

CONTENT = b"weights"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

_PROMPT = "SUBREDDIT: r/cats\nTITLE: At night\nPOST: The cat sings. Nobody sleeps.\nTL;DR:"
_POST = {"id": "0", "subreddit": "cats", "title": "At night", "body": "The cat sings. Nobody sleeps."}


def lines(*rows: Any) -> bytes:
    """JSONL."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def configs() -> list[bytes]:
    bomb = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (after, after, b",".join([b"*%c" % before] * 9))
        for before, after in zip(b"abcdefgh", b"bcdefghi", strict=True)
    )
    return [
        b"seed: 3\nsft:\n  batch_size: 8\n  optimizer: {learning_rate: 1.0e-5}\n",
        b"extends: demo\nprompt: {max_prompt_tokens: 100}\ndata:\n  posts: [a.jsonl, b.csv]\n",
        b"model: {base: tiny, tiny: {layers: 2, hidden: 32, heads: 2, rotary_dim: 8, vocab_size: 300}}\n",
        b"ppo: {kl: {coefficient: 0.1}, unfrozen_layers: all}\nruntime: {device: cpu}\n",
        bomb,
        b"extends: /dev/null/x.yaml\n",
        b"seed: 2020-99-99\n1: 2\n",
        b"seed: &a [*a]\n",
    ]


def saved_settings() -> list[bytes]:
    from rlhf.config import Config

    return [Config().to_yaml().encode(), *configs()]


def overrides() -> list[bytes]:
    return [b"seed=3", b"sft.optimizer.learning_rate=1e-5", b"data.posts=[a.jsonl, b]", b"ppo.unfrozen_layers=all",
            b"seed=2020-99-99", b"sft.=1", b"seed.x=1", b"=1", b"seed={a: [1"]  # fmt: skip


def config_names() -> list[bytes]:
    return [b"demo", b"gptj-6b", b"x.yaml", b"../x.yml", b"\0.yaml", b"x" * 300 + b".yaml"]


def rows() -> list[bytes]:
    return [
        lines(
            {"prompt": _PROMPT, "label": "it sings", "chosen": "TL;DR: the cat", "rejected": "a dog", "split": "train"},
            {**_POST, "summary": "sings", "chosen": "a", "rejected": "b", "margin": 1.5, "source": "judge"},
        ),
        b'\xef\xbb\xbf{"prompt": 3}\n\n[1]\n{"prompt": "\\ud800"}\n',
    ]


def csv_rows() -> list[bytes]:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["subreddit", "title", "body", "summary", "chosen", "rejected", "margin"])
    writer.writerow(["cats", "At night", "The cat\nsings.", "it sings", "it sings", "no", "2"])
    writer.writerow(["cats", 'a "quote"', "It, too", "it", "it", "no", ""])
    return [text.getvalue().encode(), b"a,b\n1\n\xff,2\n", b'"a\n', b"x" * 140_000]


def parquet_rows() -> list[bytes]:
    import pyarrow
    from pyarrow import parquet

    tables = [
        {"prompt": [_PROMPT], "label": ["it sings"], "chosen": ["a"], "rejected": ["b"], "margin": [1]},
        {"subreddit": ["cats", None], "title": ["", "x"], "body": ["It sings.", None], "label": ["a", "b"]},
        {"prompt": [[1, 2]], "label": [{"a": b"\xff"}]},
    ]
    found = []
    for table in tables:
        sink = io.BytesIO()
        parquet.write_table(pyarrow.table(table), sink)
        found.append(sink.getvalue())
    return found


def data_names() -> list[bytes]:
    return [b"posts-train.jsonl", b"x/validation2.csv", b"a.parquet", b"owner/name", b"..", b"x" * 300, b"a\0b.jsonl"]


def posts() -> list[bytes]:
    return [lines({**_POST, "summary": "it sings", "source": "writer", "extra": {"facts": ["cat"]}})]


def comparisons() -> list[bytes]:
    return [lines({**_POST, "chosen": "sings", "rejected": "no", "source": "j", "margin": 1.0, "extra": {}})]


def environment_rows() -> list[bytes]:
    return [lines({"id": "0", "prompt_ids": [1, 2, 3], "cut_tokens": 0, "reference_score": 0.5})]


def prompts() -> list[bytes]:
    return [
        _PROMPT.encode(),
        b"SUBREDDIT: r/r/x\r\nTITLE:\r\nPOST:\r\n\xe3\x80\x82\nTL;DR:\nTL;DR: ",
        b"SUBREDDIT:\nTITLE:\nPOST:TL;DR:",
        "SUBREDDIT:\u2028\nTITLE:\x1c\nPOST:\u3000x\x85".encode(),
    ]


def sized_prompts() -> list[bytes]:
    endless = "(SUBREDDIT: r/r/x\nTITLE:\nPOST:\0\0\n,。\nTL;DR:\nTLF\0\0\0\0\0\0\0;DR: ".encode()
    return [bytes([size]) + prompt for size in (255, 70, 40, 0) for prompt in prompts()] + [endless]


def run_names() -> list[bytes]:
    return [b"demo", b"a.b_c-1", b"..", b".", b"a/b", b"a\0", b"x" * 300, b"demo\n", b"\xff", "é".encode(), b"-x", b""]


def manifests() -> list[bytes]:
    entry = {"size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
    names = ("weights", "../../x", "/etc/passwd", "a/../../x", "a\0", "\ud800", "x" * 300, ".", "", "weights/x")
    return [json.dumps({"stage": "sft", "step": 1, "files": {name: entry}}).encode() for name in names]


def leases() -> list[bytes]:
    holder = {"host": "node", "pid": 4242, "machine": "0 pid:[1]", "started": "5"}
    claim = {"holder": holder, "seconds": 30.0, "since": "2026-01-01", "released": False}
    return [json.dumps(claim).encode(), json.dumps(claim | {"seconds": float("nan")}).encode()]


def metric_lines() -> list[bytes]:
    whole = lines({"step": 0, "time": 1.5, "sft/loss": 2.0}, {"step": 1, "time": 2.5, "sft/loss": None})
    return [whole, whole + b'{"step": 2', b'{"step": "one"}\n[1]\n']


def progress_states() -> list[bytes]:
    state = {"stage": "sft", "done": 1, "total": 8, "unit": "steps", "seconds_left": 61.5, "updated": 4e9, "shown": {}}
    return [json.dumps(state).encode(), b'{"updated": 4e9}', b'{"updated": "now"}']


def partial_lines() -> list[bytes]:
    """A line with the checksum that `rlhf.partial` wants: sha256 of the key, a space and the value."""
    digest = hashlib.sha256(b"k [1, 2]").hexdigest()
    return [lines({"key": "k", "sha256": digest, "value": [1, 2]}, {"key": "k", "sha256": "0", "value": 1}), b'{"key']


def safetensors_file(header: dict[str, Any] | None = None) -> bytes:
    """A file of two tensors, 24 and 8 bytes long; other headers go with the same 32 bytes."""
    tensors = header or {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "__metadata__": {"format": "pt"},
    }
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(32)


def safetensors_files() -> list[bytes]:
    one = {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}
    empty = {"dtype": "F32", "shape": [0, 5], "data_offsets": [32, 32]}
    return [safetensors_file(), safetensors_file({"x": one, "y": empty}), safetensors_file({"": one})]


def indices() -> list[bytes]:
    first, second = SHARDS
    return [
        json.dumps({"metadata": {"total_size": 64}, "weight_map": {"a": first, "b": first}}).encode(),
        json.dumps({"weight_map": {"a": "../x.safetensors", "b": second}}).encode(),
    ]


def save_model(directory: Path) -> None:
    """A model of a few thousand weights."""
    from tests.fakes import tiny_llama

    tiny_llama().save_pretrained(directory)


def model_configs() -> list[bytes]:
    from tests.fakes import tiny_llama, tiny_policy

    return [json.dumps(model().config.to_diff_dict()).encode() for model in (tiny_llama, tiny_policy)]


def tokenizers() -> list[bytes]:
    from tests.tiny_run import byte_tokenizer

    return [byte_tokenizer().backend_tokenizer.to_str().encode()]
