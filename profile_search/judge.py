"""The judge: what a pipeline does to the answers of the model, prompt by prompt.

Codes and decodes the prompt's KV as the wire would (`roundtrip`, frames as the engine hands them over) and asks the
model again with what arrived. Holds the references of its prompts in memory.
"""

from collections.abc import Sequence
from typing import Protocol

from engine.injection import PREFILL_TOKENS, InjectionHarness, Reference
from kv_transfer.codecs.roundtrip import roundtrip
from kv_transfer.codecs.spec import PipelineSpec
from profile_search.scores import PromptScore, score_prompt

CONTINUED_TOKENS = 64


class Judge(Protocol):
    """Scores pipelines on prompts that it knows by number."""

    num_prompts: int

    def score(self, spec: PipelineSpec, prompt_idx: int) -> PromptScore:
        """Return the score of one prompt; equal calls give equal answers."""
        ...


class InjectionJudge:
    """A judge that asks a model."""

    def __init__(self, harness: InjectionHarness, prompts: Sequence[Sequence[int]]) -> None:
        self._harness = harness
        self.references: list[Reference] = harness.refer(prompts, CONTINUED_TOKENS)
        self.num_prompts = len(self.references)

    def score(self, spec: PipelineSpec, prompt_idx: int) -> PromptScore:
        reference = self.references[prompt_idx]
        kv = reference.kv
        if spec.selection is not None:
            kv = kv[:, :, :, spec.selection.select(reference.scores, held_tokens=0)]
        kv, wire_bytes = roundtrip(spec, kv, num_tokens=kv.shape[3], frame_tokens=PREFILL_TOKENS)
        raw_bytes = reference.kv.numel() * reference.kv.element_size()
        return score_prompt(reference.logits, self._harness.inject(reference, kv), raw_bytes, wire_bytes)
