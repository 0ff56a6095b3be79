"""Every reader of what comes from outside, in one table; only our own errors may come out, whatever goes in.

`test_hypothesis` and `atheris_fuzz` drive these.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import RlhfError
from tests.fuzz import readers, samples
from tests.fuzz.codecs import GZIPPED_LINES, JSON, JSON_LINES, SAFETENSORS, YAML, Codec


@dataclass(frozen=True)
class Target:
    """A reader: what it reads (`read`, with an empty folder of its own), and inputs that are in order.

    codec takes an input apart for mutations that keep its form; cost is about how many milliseconds a case takes.
    """

    name: str
    read: Callable[[bytes, Path], None]
    samples: Callable[[], list[bytes]]
    codec: Codec | None = None
    refusals: tuple[type[Exception], ...] = (RlhfError,)
    cost: float = 1.0

    def attempt(self, data: bytes, folder: Path) -> None:
        """Read; one of our refusals is fine when its message is one line that any terminal and file can take."""
        try:
            self.read(data, folder)
        except self.refusals as refusal:
            message = str(refusal)
        else:
            return
        assert message, "a refusal that says nothing"
        assert message.isprintable(), f"a message that is no printable line: {message!r}"
        assert len(message) < 5000, f"a message of {len(message)} characters"


def in_memory() -> str | None:
    """Where to put the folders: most readers want a file for each case, which a disk slows down tenfold."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


TARGETS = (
    Target("config_file", readers.config_file, samples.configs, YAML, cost=5),
    Target("config_override", readers.config_override, samples.overrides, cost=2),
    Target("config_name", readers.config_name, samples.config_names),
    Target("saved_settings", readers.saved_settings, samples.saved_settings, YAML, cost=3),
    Target("rows_jsonl", readers.rows_jsonl, samples.rows, JSON_LINES),
    Target(
        "rows_gzip", readers.rows_gzip, lambda: [gzip.compress(rows, mtime=0) for rows in samples.rows()], GZIPPED_LINES
    ),
    Target("rows_csv", readers.rows_csv, samples.csv_rows),
    Target("rows_parquet", readers.rows_parquet, samples.parquet_rows, cost=3),
    Target("data_name", readers.data_name, samples.data_names),
    Target("published_posts", readers.published_posts, samples.posts, JSON_LINES),
    Target("published_comparisons", readers.published_comparisons, samples.comparisons, JSON_LINES),
    Target("environment", readers.environment, samples.environment_rows, JSON_LINES),
    Target("prompt", readers.prompt, samples.prompts, refusals=(ValueError,)),
    Target("prompt_tokens", readers.prompt_tokens, samples.sized_prompts, refusals=(ValueError,)),
    Target("run_name", readers.run_name, samples.run_names),
    Target("manifest", readers.manifest, samples.manifests, JSON),
    Target("audit", readers.audit, samples.manifests, JSON, cost=3),
    Target("lease", readers.lease, samples.leases, JSON),
    Target("metrics", readers.metrics, samples.metric_lines, JSON_LINES),
    Target("progress", readers.progress, samples.progress_states, JSON, cost=2),
    Target("partial_results", readers.partial_results, samples.partial_lines, JSON_LINES, cost=3),
    Target("safetensors", readers.safetensors, samples.safetensors_files, SAFETENSORS),
    Target("weight_index", readers.weight_index, samples.indices, JSON, cost=2),
    Target("model_config", readers.model_config, samples.model_configs, JSON, cost=40),
    Target("tokenizer", readers.tokenizer, samples.tokenizers, JSON, cost=20),
)
