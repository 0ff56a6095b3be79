"""Generation on a GPU: the CPU's tokens, and recorded steps that give what plain ones do."""

from __future__ import annotations

import pytest
import torch

from rlhf.generation import BuiltinEngine, Generation, Sampling
from tests.fakes import EOS_ID, PAD_ID, tiny_policy
from tests.test_generation import LENGTHS, prefer_eos, prompts_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; run on a machine that has one")


def generate(device: str, sampling: Sampling, *, cuda_graphs: bool = False) -> Generation:
    model = prefer_eos(tiny_policy(), 3.0).to(device)
    engine = BuiltinEngine(model, eos_id=EOS_ID, pad_id=PAD_ID, cuda_graphs=cuda_graphs)
    chances = torch.Generator().manual_seed(1)
    return engine.generate(prompts_of(LENGTHS), sampling, generator=chances, trunk_layers=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_gpu_writes_what_the_cpu_does(temperature: float, cuda_graphs: bool) -> None:
    sampling = Sampling(max_new_tokens=24, temperature=temperature)
    expected, actual = generate("cpu", sampling), generate("cuda", sampling, cuda_graphs=cuda_graphs)
    assert torch.equal(actual.response_BR.cpu(), expected.response_BR)
    assert torch.equal(actual.response_mask_BR.cpu(), expected.response_mask_BR)
    torch.testing.assert_close(actual.logprobs_BR.cpu(), expected.logprobs_BR, atol=1e-3, rtol=0)
    for states, expected_states in zip(actual.trunk or [], expected.trunk or [], strict=True):
        torch.testing.assert_close(states.cpu(), expected_states, atol=1e-4, rtol=1e-4)
