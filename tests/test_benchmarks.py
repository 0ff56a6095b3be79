"""The benchmarks run; what they say is for people. What they compare with is held to numbers counted by hand."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ET
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTJConfig, GPTJForCausalLM

from rlhf.checkpoint import StageDir
from rlhf.environment import load_environment
from rlhf.experience import InHand
from rlhf.models import load_reward_model
from rlhf.oversight import Oversight
from rlhf.ppo_setup import build_learner
from rlhf.scoring import Scorer
from rlhf.stages import ppo
from rlhf.stopping import StopSignal
from rlhf.telemetry import Stopwatch
from rlhf.tokenizer import load_tokenizer
from rlhf.watchdog import Watchdog
from tests.benchmarks import bench, limits, ppo_iteration, saving, scaling, trlx_example, trlx_ppo
from tests.benchmarks.bench_run import Size, make_run, settings
from tests.benchmarks.limit_chart import chart, markdown
from tests.benchmarks.limits import Machine, Phase, Shape, Work
from tests.benchmarks.machine import measure_machine
from tests.benchmarks.phases import ppo_phases, tasks
from tests.benchmarks.service import measure, table

SHAPE = Shape(layers=2, unfrozen=1, hidden=4, vocabulary=10)
TINY = Size(
    layers=2, unfrozen=1, hidden=32, heads=2, rotary=8, vocabulary=260, prompt=16, response=4, rollouts=8, chunk=4,
    minibatch=4, micro_batch=4, epochs=1, scored=5, batch_tokens=40,
)  # fmt: skip
RECORDED = ["--layers=3", "--hidden=32", "--heads=4", "--rotary=8", "--vocabulary=300", "--prompt=24", "--response=8"]
RECORDED += ["--positions=40", "--rollouts=16", "--iterations=2"]


@pytest.fixture
def own_accelerator() -> Iterator[None]:
    """Accelerate's settings outlive a stage, and the next one may want others."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_service_benchmark_measures_every_load() -> None:
    results = measure(requests=16, callers=4, threads=1)
    loads = {name for name, load in results.items() if isinstance(load, dict) and load["requests_per_second"] > 0}
    assert loads == {
        "one at a time, 1 caller",
        "one at a time, 4 callers",
        "batched, 4 callers",
        "batched, half load",
    }
    assert len(table(results).splitlines()) == 1 + len(results)


def test_the_saving_benchmark_measures_both_ways(tmp_path: Path) -> None:
    found = saving.measure(tmp_path, megabytes=4, rounds=2)
    assert 0 < found.waits < found.in_background
    assert found.ratio == found.at_once / found.waits


def test_prefill_and_decode_spend_what_is_counted_by_hand() -> None:
    # A row: block 1 has 3 tokens x 384 + attention 16 x (1 + 2 + 3); block 2 keys and values of 3 tokens (192), the
    # rest of one (320) and its attention (16 x 3); the LM head 80. Bytes: 2 blocks of 192 numbers, 40, 2 x 48 cached.
    assert limits.prefill(SHAPE, rows=2, prompt=3).passes == (Work(2 * (1248 + 560 + 80), 4 * (384 + 40 + 96)),)
    # The second token: 2 x (384 + 40), and in 2 blocks a look at 4 tokens, 64 each; 2 rows.
    step = Work(2 * (848 + 128), 4 * (384 + 40 + 128))
    assert limits.decode(SHAPE, rows=2, prompt=3, response=2, passes=3).passes == (step,) * 3
    assert limits.decode(SHAPE, rows=2, prompt=3, response=1).passes == ()


def test_scoring_and_experience_spend_what_is_counted_by_hand() -> None:
    # Block 1: 5 x 384 + 16 x 15. Block 2: keys and values 5 x 64, the last token's rest 320 and attention 80. Head 8.
    assert limits.scoring(SHAPE, rows=2, tokens=5).passes == (Work(2 * (2160 + 720 + 8), 4 * 384),)
    # 4 tokens, 2 of them read: 4 x 64 + 2 x 320 + 16 x (3 + 4) = 1008, twice; 2 x 2 x (40 + 40 + 40) in the heads.
    counts = {"rows": 2, "prompt": 3, "response": 2}
    assert limits.experience(SHAPE, **counts).passes == (Work(2 * (2 * 1008 + 480), 4 * (2 * 192 + 120)),)
    # The trunk's block: 4 x 384 + 16 x (1 + 2 + 3 + 4) = 1696.
    assert limits.experience(SHAPE, **counts, trunk=True).work.flops == 2 * (2 * 1008 + 480 + 1696)


def test_training_spends_what_is_counted_by_hand() -> None:
    counts = {"rows": 2, "prompt": 3, "response": 2, "steps": 3}
    # Forward 1008 + 2 x 2 x (40 + 40) a row, three times that with the backward pass; 272 numbers are trained.
    # Not wanted: 4 tokens' gradients through key and value, 4 x 64, and 2 tokens' through query and MLP, 2 x 160.
    passes = Work(3 * 2 * 1328 - 2 * 576, 4 * 3 * 272), Work(0, 4 * 7 * 272)
    assert limits.training(SHAPE, **counts).passes == passes * 3


def test_a_phase_is_as_long_as_its_passes_at_the_limit_of_each() -> None:
    phase = Phase((Work(flops=20, bytes=1), Work(flops=10, bytes=3)))
    assert phase.seconds(Machine(flops=10, bandwidth=1)) == 2 + 3
    assert phase.work == Work(30, 4)


def test_the_limit_model_counts_as_torch_does() -> None:
    config = GPTJConfig(vocab_size=50, n_positions=16, n_embd=24, n_layer=3, n_head=2, rotary_dim=4)
    model = GPTJForCausalLM._from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.zeros(2, 7, dtype=torch.long))
    shape = Shape(layers=3, unfrozen=1, hidden=24, vocabulary=50)
    assert limits.plain_forward(shape, rows=2, tokens=7) == counted.get_total_flops()
    # Causal queries look at 28 pairs of tokens in place of 49; all else is the same.
    spared = 3 * 2 * 4 * 24 * (49 - 28)
    head = 2 * 7 * 2 * 24 * 50
    assert limits.blocks(shape, 3, rows=2, tokens=7) + head == counted.get_total_flops() - spared


def test_the_machine_is_measured() -> None:
    found = measure_machine(torch.device("cpu"), torch.float32, size=64, megabytes=1, repeats=1)
    assert min(found.flops, found.read, found.copy, found.step_seconds) > 0
    assert found.machine == Machine(found.flops, max(found.read, found.copy))


@pytest.mark.usefixtures("own_accelerator")
def test_every_phase_is_held_against_its_limit() -> None:
    machine = measure_machine(torch.device("cpu"), torch.float32, size=64, megabytes=1, repeats=1)
    seconds = bench.measure(TINY, device=torch.device("cpu"), threads=1, repeats=1)
    rows = bench.as_rows(seconds, TINY, torch.float32, machine.machine)
    alone, ppo = ["prefill", "decode", "summaries", "scoring"], ["rollout", "score", "experience", "train", "iteration"]
    assert [row["phase"] for row in rows] == alone + [f"ppo {name}" for name in ppo]
    for row in rows:
        assert row["seconds"] > 0
        assert row["share"] == pytest.approx(row["limit_seconds"] / row["seconds"])
    spent = {row["phase"]: row["gflop"] for row in rows}
    assert spent["summaries"] == pytest.approx(spent["prefill"] + spent["decode"])
    assert spent["ppo rollout"] == pytest.approx(2 * spent["summaries"])  # two chunks
    assert spent["ppo iteration"] == pytest.approx(sum(spent[f"ppo {name}"] for name in ppo[:-1]))
    assert len(bench.table(rows).splitlines()) == 1 + len(rows)
    drawn = ET.fromstring(chart({"before": rows, "after <now>": rows}, title="a machine"))
    assert len(drawn.findall("{http://www.w3.org/2000/svg}g")) == 2 * len(rows)
    lines = markdown({"before": rows, "now": rows}).splitlines()
    assert {line.count("|") for line in lines} == {3 + 3 * 2 + 1}
    assert len(lines) == 2 + len(rows)


@pytest.mark.usefixtures("own_accelerator")
def test_our_code_spends_what_it_must_and_no_more(tmp_path: Path) -> None:
    rows = make_run(tmp_path / "run", TINY, dtype=torch.float32)
    config = settings(TINY, device="cpu", dtype=torch.float32, threads=1)
    learner = build_learner(config, StageDir(tmp_path / "run", "ppo"))
    phases = ppo_phases(TINY, torch.float32)
    with Watchdog(config.runtime.hang_after_seconds) as watchdog:
        oversight = Oversight(StopSignal(), watchdog)
        rollouts = ppo.sample(learner, ppo.draw_prompts(learner, rows), Stopwatch(), oversight)
        sequences = [one.row.prompt_ids + one.response_R.tolist() for one in rollouts]
        with FlopCounterMode(display=False) as scoring:
            learner.scorer.score(sequences)
        in_hand = InHand(*ppo.learn_from(learner, rollouts))
        with FlopCounterMode(display=False) as training:
            ppo.optimise(learner, in_hand, oversight)
    # torch does not count fused attention on a CPU, which is little here.
    for counted, name in ((scoring, "score"), (training, "train")):
        assert 0.9 < counted.get_total_flops() / phases[name].work.flops <= 1.0


def test_options_change_a_preset() -> None:
    options = bench.parser().parse_args(["--preset", "6b", "--layers", "2", "--batch-tokens", "1000"])
    size = bench.size_of(options)
    assert (size.layers, size.hidden, size.batch_tokens, size.prompt) == (2, 4096, 1000, 500)


def test_sequences_are_scored_in_whole_passes_and_a_rest() -> None:
    task = tasks(TINY, torch.float32)["scoring"]
    # 5 sequences of 20 tokens, two a pass of 40: block 1 is 24 x 32^2 a token and 128 x 210 of attention; in block 2
    # keys and values of all tokens, the rest of the last one.
    row = 20 * 24576 + 128 * 210 + 2 * 1024 * (2 * 20 + 10) + 128 * 20 + 64
    assert [one.flops for one in task.phase.passes] == [2 * row, 2 * row, row]


def test_the_limits_of_a_machine_elsewhere_are_told() -> None:
    rows = [line.split() for line in bench.elsewhere(TINY, [1.0, 1e9]).splitlines()[1:]]
    assert {row[-3] for row in rows} == {"100.0%"}


def test_targets_are_told_beside_what_was_reached() -> None:
    rows = [{"phase": name, "per_second": 60.0, "unit": "pieces"} for name in bench.WANTED]
    verdicts = [line.split()[-1] for line in bench.targets(rows).splitlines() if "pieces" in line]
    assert verdicts == ["missed", "reached", "reached"]


def test_a_line_and_a_power_are_fitted() -> None:
    line = scaling.fit([1, 2, 4], [5, 7, 11])
    assert (line.intercept, line.slope, line.r2) == pytest.approx((3, 2, 1))
    square = scaling.fit([1, 2, 4], [5, 20, 80])
    assert square.exponent == pytest.approx(2)
    assert square.r2 < 0.99


def test_an_axis_is_told_with_its_fits() -> None:
    points = [scaling.Point(x, {"train": 2 * x, "iteration": 3 * x}, 10**6 * (5 + x), 1e9 * x**2) for x in (1, 2, 3, 4)]
    cells = scaling.markdown({"rollouts": points}).splitlines()[2].split(" | ")
    assert cells[1:] == ["1, 2, 3, 4", "1.0000", "1.00", "2.00", "5 + 1 × rollouts", "1.0000 |"]
    assert len(scaling.report("rollouts", points).splitlines()) == 1 + 4 + 4


def test_the_peak_counts_what_was_alive_together() -> None:
    def work() -> None:
        for _ in range(3):
            torch.zeros(1000)  # freed before the next
        kept = torch.zeros(500)
        torch.zeros(2000)
        del kept

    assert scaling.peak_bytes(work, torch.device("cpu")) == 4 * 2500


@pytest.mark.usefixtures("own_accelerator")
def test_a_size_is_a_point_on_its_axis() -> None:
    point = scaling.measure("rollouts", TINY, device=torch.device("cpu"), threads=1, repeats=1)
    assert point.x == 8
    assert point.flops > 0
    assert min(point.seconds.values()) > 0
    assert point.peak_bytes > 2 * 4 * TINY.shape(torch.float32).parameters  # policy and reward model at least
    assert scaling.AXES["parameters"][0].hidden == scaling.BASE.hidden


@pytest.fixture(scope="module")
def recorded_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Namespace, Path]:
    """The recorded configuration's run, small."""
    options = ppo_iteration.parser().parse_args(RECORDED)
    run_dir = tmp_path_factory.mktemp("recorded") / "run"
    trlx_example.prepare(run_dir, options)
    return options, run_dir


def test_the_examples_scores_are_ours(recorded_run: tuple[Namespace, Path]) -> None:
    options, run_dir = recorded_run
    rows = load_environment(StageDir(run_dir, "prepare").final(), "train")[:5]
    tokenizer = load_tokenizer(StageDir(run_dir, "sft").final(), key="sft/final")
    example = trlx_example.example_scorer(run_dir, tokenizer, max_length=options.positions)
    sequences = [row.prompt_ids + list(range(40, 40 + number)) for number, row in enumerate(rows, start=1)]
    ours = Scorer(load_reward_model(StageDir(run_dir, "reward").final()), batch_tokens=99)
    scores = example.score(sequences)
    assert scores.std() > 1e-3
    torch.testing.assert_close(scores, ours.score(sequences), rtol=0, atol=1e-5)
    known = {tokenizer.decode(row.prompt_ids): row.reference_score for row in rows}
    assert example.reference_scores == pytest.approx(known, abs=1e-5)


@pytest.mark.usefixtures("own_accelerator")
def test_our_engine_is_measured_on_the_recorded_configuration(recorded_run: tuple[Namespace, Path]) -> None:
    options, run_dir = recorded_run
    found = trlx_ppo.run_engine("builtin", run_dir, options)
    assert found["tokens"] == 8  # EOS never comes
    assert len(ppo_iteration.recorded(found).splitlines()) == 1 + len(ppo_iteration.RECORDED)


def test_the_verdict_names_what_it_compares_with() -> None:
    ours = {"samples/s": 7.2}
    assert "4.00 times trlX's, in this run" in ppo_iteration.verdict({"builtin": ours, "trlx": {"samples/s": 1.8}})
    assert "4.00 to 4.50 times trlX's, which is of other runs" in ppo_iteration.verdict({"builtin": ours})


@pytest.mark.skipif(importlib.util.find_spec("trlx") is None, reason=trlx_ppo.ABSENT)
@pytest.mark.usefixtures("own_accelerator")
def test_both_engines_see_the_same_numbers(recorded_run: tuple[Namespace, Path]) -> None:
    from tests.benchmarks.same_numbers import differences

    options, run_dir = recorded_run
    found = differences(trlx_ppo.settings(options), run_dir, max_length=options.positions)
    assert set(found) == {"log-probability", "reference's", "value", "loss", "score", "score of the reference"}
    assert max(found.values()) < 1e-5
