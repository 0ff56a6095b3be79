"""Imports point down, as the architecture draws them; stages, presets and commands agree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.__main__ import STAGE_HELP, build_parser
from rlhf.pipeline import STAGE_NAMES, STAGES
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "rlhf"
SERVICE = REPOSITORY / "app"

# What the service may use of the pipeline: models, data formats and the machine, but no training.
SERVED = {
    "cgroups", "checkpoint", "config", "config_reference", "console", "errors", "generation", "model_files", "models",
    "pipeline", "presets", "prompt", "runtime", "sampling", "scoring", "sequences", "slots", "storage", "telemetry",
    "tokenizer", "vllm_engine", "weights",
}  # fmt: skip

# A module may import from its own line and the lines above it.
LAYERS = (
    {"errors", "synthetic_wording", "processes", "gpus", "cgroups", "triton_cache", "quoting", "broken_texts", "step"},
    {"config", "console", "storage", "stopping", "service_client"},
    {"lease", "watchdog", "vllm_limits", "packing", "onednn", "deepspeed_settings", "weights"},
    {"folded_norm"},
    {"checkpoint", "skeleton", "gptj", "weight_reading"},
    {"model_shape", "memory_strategy"},
    {"model_families", "memory_activations"},
    {"memory_trained"},
    {"memory_steps"},
    {"memory_stages"},
    {"memory_plan"},
    {
        "presets",
        "config_reference",
        "runtime",
        "telemetry",
        "schedule",
        "results",
        "shares",
        "placement",
        "health",
        "model_files",
        "forward",
        "vocabulary",
    },
    {"prompt", "losses", "advantages", "bootstrap", "calibration", "rouge", "charts", "pipeline", "saver", "oversight"},
    {
        "data",
        "tokenizer",
        "models",
        "environment",
        "status",
        "hub",
        "pickled",
        "lengths",
        "launcher",
        "cluster",
        "training_state",
    },
    {"running", "partial", "audit", "adapters", "quantized", "published_checkpoint", "replicas", "zero"},
    {
        "synthetic",
        "sources",
        "actor_critic",
        "collate",
        "base_model",
        "evaluation",
        "figures",
        "findings",
        "repair",
        "adapter_files",
        "import_model",
        "sharding",
    },
    {"intake", "report", "lora", "pair_batches", "import_command", "memory_advice"},
    {"plan_text"},
    {"plan_command"},
    {"curate"},
    {"sampling", "sequences", "bag_attention"},
    {"row_buffers"},
    {"kv_cache", "trunk_states", "score_batches", "scoring", "remote_scorer"},
    {"block_linears", "cuda_graph", "overlap"},
    {"gptj_decoder"},
    {"decoding"},
    {"slots"},
    {"generation"},
    {"vllm_process"},
    {"vllm_batch"},
    {"vllm_engine"},
    {"rollout", "likelihood", "preference"},
    {"ppo_sampler", "experience", "passes", "training_setup", "training_eval"},
    {"exchange", "ppo_setup", "training_checkpoint"},
    {"ppo_state", "ppo_evaluation", "training"},
    {"trlx"},
    {"preflight"},
    {"stages"},
    {"__main__"},
    {"launched"},
)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The modules of this package that a file names, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("rlhf", "app"):
            if node.module == "rlhf":
                names |= {f"rlhf.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] in ("rlhf", "app")}
    return names - {"rlhf.__version__"}


def layer_of(module: str) -> int:
    short = module.split(".")[1]
    found = [number for number, layer in enumerate(LAYERS) if short in layer]
    assert found, f"{module} has no place in tests/test_layers.py"
    return found[0]


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    if path.name == "__init__.py":
        assert imported(path) == set()
        return
    here = layer_of(".".join(("rlhf", *path.relative_to(PACKAGE).with_suffix("").parts)))
    above = {name for name in imported(path) if name.startswith("app") or layer_of(name) > here}
    assert above == set()


@pytest.mark.parametrize("path", sorted((PACKAGE / "stages").glob("*.py")), ids=lambda path: path.stem)
def test_a_stage_never_imports_a_stage(path: Path) -> None:
    assert [name for name in imported(path) if name.startswith("rlhf.stages")] == []


@pytest.mark.parametrize("path", sorted(SERVICE.glob("*.py")), ids=lambda path: path.stem)
def test_the_service_uses_no_training(path: Path) -> None:
    used = {name.split(".")[1] for name in imported(path) if name.startswith("rlhf.")}
    assert used - SERVED == set()


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, rlhf, rlhf.__main__, rlhf.config, rlhf.pipeline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_stages_programs_and_commands_agree() -> None:
    programs = {path.stem for path in (PACKAGE / "stages").glob("*.py")} - {"__init__"}
    assert set(STAGE_NAMES) == programs == set(STAGE_HELP)
    for stage in STAGES:
        assert build_parser().parse_args([stage.name]).stage == stage.name
