"""The sampler on a CUDA device chooses what it chooses on the CPU."""

import pytest
import torch

from core.request import SamplingParams
from engine.sampler import Sampler, SamplingState

VOCAB_SIZE = 5003
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(top_k=7),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.999, temperature=5.0),
    SamplingParams(min_p=0.01),
    SamplingParams(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2),
    SamplingParams(logit_bias={3: 10.0}, min_tokens=5, max_tokens=9, stop_token_ids=(1, 2)),
    SamplingParams(temperature=0.0, logprobs=5),
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


def test_choices_equal_those_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(5)
    samplers = {device: Sampler(VOCAB_SIZE, device) for device in ("cpu", "cuda")}
    states = [SamplingState(params, range(40), (0,)) for params in PARAMS]
    for _ in range(50):
        logits = torch.randn(len(PARAMS), VOCAB_SIZE, generator=generator) * 3
        choices = {device: sampler.choose(logits.clone().to(device), states) for device, sampler in samplers.items()}
        assert choices["cuda"].token_ids == choices["cpu"].token_ids
        theirs, ours = choices["cuda"].details[8], choices["cpu"].details[8]
        assert theirs.logprob == pytest.approx(ours.logprob, abs=1e-5)
        assert [top.token_id for top in theirs.top_logprobs] == [top.token_id for top in ours.top_logprobs]
        for state, token_id in zip(states, choices["cpu"].token_ids, strict=True):
            state.add(token_id)


def test_rows_without_finite_numbers_fail_alone() -> None:
    generator = torch.Generator().manual_seed(6)
    sampler = Sampler(VOCAB_SIZE, "cuda")
    states = [SamplingState(params, range(40), (0,)) for params in PARAMS]
    logits = torch.randn(len(PARAMS), VOCAB_SIZE, generator=generator) * 3
    expected = sampler.choose(logits.clone().cuda(), states)
    assert expected.failed == ()
    for row in range(len(PARAMS)):
        for value in (torch.nan, torch.inf):
            spoiled = logits.clone()
            spoiled[row, 57] = value
            choices = sampler.choose(spoiled.cuda(), states)
            assert choices.failed == (row,)
            good = [at for at in range(len(PARAMS)) if at != row]
            assert [choices.token_ids[at] for at in good] == [expected.token_ids[at] for at in good]
            assert sampler.choose(spoiled[row : row + 1].cuda(), states[row : row + 1]).failed == (0,)
