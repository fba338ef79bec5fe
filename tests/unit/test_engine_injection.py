"""KV injection: equal KV give equal bits; other KV give other answers; the answers are transformers' own."""

from pathlib import Path

import pytest
import torch

from engine.injection import InjectionHarness
from tests import model_matrix


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("family", [*model_matrix.FAMILIES, "tiny"])
def test_a_family_continues_as_it_does_alone_and_injecting_its_own_kv_changes_nothing(
    family: str, folder: Path
) -> None:
    path = model_matrix.checkpoint(family, folder)
    harness = InjectionHarness.load(path, kv_cache_bytes=4 * 2**20)
    prompts = model_matrix.prompts(harness.info.vocab_size, count=6)
    references = harness.refer(prompts, 8)
    if family != "tiny":  # which computes in bfloat16: near ties may differ from transformers' float32
        answers = model_matrix.generate(path, prompts, 8)
        assert [list(reference.continuation) for reference in references] == [a for a in answers if len(a) >= 2]
    for reference in references:
        layout = (harness.info.num_layers, 2, harness.info.num_kv_heads, len(reference.prompt), harness.info.head_dim)
        assert reference.kv.shape == layout
        assert torch.equal(harness.inject(reference, reference.kv), reference.logits)
    if family != "tiny":
        picked = [reference.logits.argmax(dim=-1).tolist() for reference in references]
        assert picked == [list(reference.continuation[1:]) for reference in references]


def test_what_was_injected_before_does_not_matter(folder: Path) -> None:
    harness = InjectionHarness.load(model_matrix.checkpoint("qwen3", folder), kv_cache_bytes=2**20)
    first, second = harness.refer([[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]], 6)
    spoilt = torch.zeros_like(second.kv)
    assert not torch.equal(harness.inject(second, spoilt), second.logits)
    assert torch.equal(harness.inject(first, first.kv), first.logits)
    assert torch.equal(harness.inject(second, second.kv), second.logits)


def test_groups_of_prompts_do_not_disturb_each_other(folder: Path) -> None:
    path = model_matrix.checkpoint("llama", folder)
    prompts = model_matrix.prompts(model_matrix.VOCAB_SIZE, count=8)
    crowded = InjectionHarness.load(path, kv_cache_bytes=128 * 2**10).refer(prompts, 6)
    roomy = InjectionHarness.load(path, kv_cache_bytes=8 * 2**20).refer(prompts, 6)
    assert [reference.continuation for reference in crowded] == [reference.continuation for reference in roomy]


def test_heavy_hitters_matter_more_than_as_many_other_tokens() -> None:
    harness = InjectionHarness.load(model_matrix.TINY_PATH, kv_cache_bytes=4 * 2**20)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 400, (96,), generator=generator).tolist() for _ in range(4)]
    lost = {True: 0.0, False: 0.0}
    for reference in harness.refer(prompts, 16):
        always = torch.arange(88, 96)
        ranked = reference.scores[:88].argsort(descending=True)
        for is_heavy, chosen in ((True, ranked[:32]), (False, ranked[-32:])):
            kept = torch.cat([chosen, always]).sort().values
            log_p = harness.inject(reference, reference.kv[:, :, :, kept]).log_softmax(dim=-1)
            wanted = reference.logits.log_softmax(dim=-1)
            lost[is_heavy] += float((wanted.exp() * (wanted - log_p)).sum())
    assert 0 < lost[True] < lost[False] / 2
