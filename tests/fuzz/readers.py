"""Each reader of what comes from outside, called as the commands call it; `targets` lists them with their samples.

A reader gets any bytes and a folder of its own, and asserts what must hold for whatever it accepts. Our modules are
imported inside the functions: atheris instruments what is imported late, and most readers then start without torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

from rlhf.errors import RlhfError
from tests.fuzz import samples


def text_of(data: bytes) -> str:
    """Any bytes as text; some of it has halves of surrogate pairs, as names from the command line can."""
    return data.decode("utf-8", "surrogateescape")


# --- configuration ---------------------------------------------------------------------------------------


def config_file(data: bytes, folder: Path) -> None:
    """`--config FILE`; what is accepted survives being saved and read."""
    from rlhf.presets import load_config

    (folder / "config.yaml").write_bytes(data)
    config = load_config(str(folder / "config.yaml"))
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(str(folder / "config.yaml")) == config


def config_override(data: bytes, folder: Path) -> None:
    """`--set KEY=VALUE`."""
    from rlhf.presets import load_config

    (folder / "empty.yaml").touch()
    load_config(str(folder / "empty.yaml"), [text_of(data)])


def config_name(data: bytes, folder: Path) -> None:
    """`--config NAME`."""
    from rlhf.presets import load_config

    load_config(text_of(data))


def saved_settings(data: bytes, folder: Path) -> None:
    """The settings beside a stage's checkpoints, on resume."""
    from rlhf.config import Config
    from rlhf.pipeline import check_settings

    stage = folder / "run" / "sft"
    (stage / "step-00000001").mkdir(parents=True, exist_ok=True)
    (stage / "config.yaml").write_bytes(data)
    check_settings(Config(), folder / "run")


# --- data --------------------------------------------------------------------------------------------------


def _take_in(path: Path) -> None:
    """As `fetch` does: rows out of a file, records out of rows, and what is wrong with them."""
    from rlhf.intake import Intake, comparison_from, example_from, parse_rows
    from rlhf.sources import read_rows

    for parse in (example_from, comparison_from):
        intake = Intake.of("data.posts", str(path))
        records = parse_rows(read_rows(str(path), key="data.posts"), parse, intake)
        for placed in records:
            json.dumps(placed.record.to_row(), ensure_ascii=False).encode()
            assert len(placed.record.post.id) == 64
        with contextlib.suppress(RlhfError):
            intake.check_filled({"train": records})
        intake.check_bad(0.0)


def rows_jsonl(data: bytes, folder: Path) -> None:
    (folder / "rows.jsonl").write_bytes(data)
    _take_in(folder / "rows.jsonl")


def rows_gzip(data: bytes, folder: Path) -> None:
    (folder / "rows.jsonl.gz").write_bytes(data)
    _take_in(folder / "rows.jsonl.gz")


def rows_csv(data: bytes, folder: Path) -> None:
    (folder / "rows.csv").write_bytes(data)
    _take_in(folder / "rows.csv")


def rows_parquet(data: bytes, folder: Path) -> None:
    (folder / "rows.parquet").write_bytes(data)
    _take_in(folder / "rows.parquet")


def data_name(data: bytes, folder: Path) -> None:
    """What `data.posts` can name: split names are read out of it."""
    from rlhf.hub import is_hub_name
    from rlhf.sources import read_rows, split_of_file

    name = text_of(data)
    assert split_of_file(folder / name.replace("\0", "")) in ("train", "valid", "test", None)
    if not is_hub_name(name):
        list(read_rows(str(folder) + "/" + name, key="data.posts"))


def published_posts(data: bytes, folder: Path) -> None:
    """What the stages after `fetch` read."""
    from rlhf.data import load_examples

    (folder / "posts-train.jsonl").write_bytes(data)
    for example in load_examples(folder, "train"):
        assert example.post.id


def published_comparisons(data: bytes, folder: Path) -> None:
    from rlhf.data import load_comparisons

    (folder / "comparisons-train.jsonl").write_bytes(data)
    for comparison in load_comparisons(folder, "train"):
        assert isinstance(comparison.chosen, str)
        assert isinstance(comparison.rejected, str)


def environment(data: bytes, folder: Path) -> None:
    """What PPO reads; every row has the types that it counts on."""
    from rlhf.environment import load_environment

    (folder / "environment-train.jsonl").write_bytes(data)
    for row in load_environment(folder, "train"):
        assert all(type(token) is int and token >= 0 for token in row.prompt_ids)
        assert row.reference_score - row.reference_score == 0.0


def prompt(data: bytes, folder: Path) -> None:
    """The prompt parser; what is accepted is canonical."""
    from rlhf.prompt import parse_prompt, parse_summary, render_prompt

    text = text_of(data)
    parse_summary(text)
    post = parse_prompt(text)
    assert parse_prompt(render_prompt(post)) == post


def prompt_tokens(data: bytes, folder: Path) -> None:
    """A post made to fit: never longer than asked, header and `TL;DR:` whole."""
    from rlhf.prompt import decode_response, encode_prompt, encode_response, parse_prompt, parse_summary

    tokenizer = _tokenizer()
    room, text = (data[0] if data else 0), text_of(data[1:])
    summary = parse_summary(text).encode("utf-8", "replace").decode()
    assert decode_response(tokenizer, encode_response(tokenizer, summary)) == summary
    encoded = encode_prompt(tokenizer, parse_prompt(text), max_tokens=room)
    assert len(encoded.ids) <= room
    assert tokenizer.decode(encoded.ids).endswith("\nTL;DR:")


@functools.cache
def _tokenizer() -> Any:
    from tests.tiny_run import byte_tokenizer

    return byte_tokenizer()


# --- a run's directory ----------------------------------------------------------------------------------------


def run_name(data: bytes, folder: Path) -> None:
    """`--run NAME`: an accepted one is a folder directly below the runs."""
    from rlhf.checkpoint import run_directory

    directory = run_directory(folder, text_of(data))
    assert directory.parent == folder
    assert os.path.normpath(directory) == str(directory)
    directory.is_dir()


def manifest(data: bytes, folder: Path) -> None:
    """A published directory; what passes names only files inside it."""
    from rlhf.checkpoint import fingerprint, read_manifest, verify

    step = folder / "step-00000001"
    step.mkdir(exist_ok=True)
    (step / "weights").write_bytes(samples.CONTENT)
    (step / "manifest.json").write_bytes(data)
    fingerprint(step)
    for name in read_manifest(step)["files"]:
        assert os.path.normpath(step / name).startswith(str(step))
    verify(step)


def audit(data: bytes, folder: Path) -> None:
    """`rlhf verify`: never tired by what it finds, and it says so in lines that a terminal can take."""
    from rlhf.audit import verify_run

    stage = folder / "run" / "sft"
    for step in (1, 2):
        (stage / f"step-0000000{step}").mkdir(parents=True, exist_ok=True)
        (stage / f"step-0000000{step}" / "weights").write_bytes(samples.CONTENT)
    (stage / "step-00000001" / "manifest.json").write_bytes(data)
    (stage / "step-00000002" / "manifest.json").write_bytes(samples.manifests()[0])
    (stage / "progress.json").write_bytes(data)
    said: list[str] = []
    assert verify_run(folder / "run", say=said.append) in (0, 65)
    assert all(line.isprintable() for text in said for line in text.split("\n"))


def lease(data: bytes, folder: Path) -> None:
    """Who holds a stage, read from a file that anything may have happened to."""
    from rlhf.lease import is_dead, look, parse_claim

    claim = parse_claim(text_of(data))
    if claim is not None:
        is_dead(claim.holder)
    room = folder / ".writer-00000001"
    room.mkdir(exist_ok=True)
    (room / "lease.json").write_bytes(data)
    look(folder)


def metrics(data: bytes, folder: Path) -> None:
    """metrics.jsonl, on resume and for the report."""
    from rlhf.telemetry import read_metrics

    (folder / "metrics.jsonl").write_bytes(data)
    json.dumps([row for row in read_metrics(folder / "metrics.jsonl") if row["step"] < 3])


def progress(data: bytes, folder: Path) -> None:
    """progress.json, by `rlhf status`."""
    from rlhf.status import status_table

    (folder / "sft").mkdir(exist_ok=True)
    (folder / "sft" / "progress.json").write_bytes(data)
    assert status_table(folder).count("\n") == 6


def partial_results(data: bytes, folder: Path) -> None:
    """What a killed stage had computed; only lines whose checksum holds come back."""
    from rlhf.checkpoint import StageDir
    from rlhf.partial import PartialResults

    (folder / "evaluate").mkdir(exist_ok=True)
    (folder / "evaluate" / "partial.jsonl").write_bytes(data)
    with PartialResults(StageDir(folder, "evaluate"), "partial.jsonl") as results:
        assert len(results) <= data.count(b"\n") + 1


# --- model directories ------------------------------------------------------------------------------------------


def safetensors(data: bytes, folder: Path) -> None:
    """A weight file; whatever we accept, the library that reads the weights does too."""
    from safetensors import safe_open

    from rlhf.weights import stored_tensors

    (folder / "model.safetensors").write_bytes(data)
    stored = stored_tensors(folder)
    with safe_open(folder / "model.safetensors", framework="np") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert theirs == {name: tensor.shape for name, tensor in stored.items()}


def weight_index(data: bytes, folder: Path) -> None:
    """The index of shards; no accepted name leads out of the directory."""
    from rlhf.weights import stored_tensors, weight_files

    for name in samples.SHARDS:
        (folder / name).write_bytes(samples.safetensors_file())
    (folder / "model.safetensors.index.json").write_bytes(data)
    assert all(path.resolve().parent == folder.resolve() for path in weight_files(folder))
    stored_tensors(folder)


def model_config(data: bytes, folder: Path) -> None:
    """config.json beside good weights: refused, or a model of about their size."""
    from transformers import AutoModelForCausalLM

    from rlhf.model_files import open_config
    from rlhf.skeleton import build_skeleton

    directory = folder / "model"
    if not directory.is_dir():
        samples.save_model(directory)
    (directory / "config.json").write_bytes(data)
    config, stored = open_config(directory)
    build_skeleton(AutoModelForCausalLM, config, stored, directory / "config.json")


def tokenizer(data: bytes, folder: Path) -> None:
    """tokenizer.json; the small file beside it is in order."""
    from rlhf.tokenizer import load_tokenizer

    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_bytes(data)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    load_tokenizer(folder / "tokenizer", key="model.tokenizer")
