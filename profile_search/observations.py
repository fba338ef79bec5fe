"""What has been measured so far, kept in the journal: costs of candidates, and their scores on prefixes of the prompts.

The only place through which a search asks its judge, so that nothing is measured twice and everything is written down.
"""

from collections.abc import Callable
from dataclasses import asdict

from kv_transfer.codecs.spec import PipelineSpec
from profile_search.candidates import Candidate
from profile_search.cost import Cost
from profile_search.journal import Journal
from profile_search.judge import Judge
from profile_search.scores import PromptScore


class Observations:
    """Measurements by candidate key."""

    def __init__(self, judge: Judge, journal: Journal | None = None, split: str = "search") -> None:
        self._judge, self._journal, self._split = judge, journal, split
        self._scores: dict[str, list[PromptScore]] = {}
        self._costs: dict[str, Cost] = {}
        for row in journal.rows if journal else ():
            if row["what"] == "cost" and split == "search":
                self._costs[row["candidate"]] = Cost.from_row(row["cost"])
            elif row["what"] == split:
                self._scores.setdefault(row["candidate"], []).append(PromptScore(**row["score"]))

    @property
    def num_prompts(self) -> int:
        return self._judge.num_prompts

    @property
    def num_scores(self) -> int:
        """Prompts judged so far, over all candidates; also those that were read from the journal."""
        return sum(len(scores) for scores in self._scores.values())

    def cost(self, candidate: Candidate, measure: Callable[[PipelineSpec], Cost]) -> Cost:
        """Return its cost, measured now unless it was before."""
        if candidate.key not in self._costs:
            self._costs[candidate.key] = measure(candidate.spec)
            self._note("cost", candidate.key, cost=self._costs[candidate.key].to_row())
        return self._costs[candidate.key]

    def scores(self, candidate: Candidate) -> tuple[PromptScore, ...]:
        """Return what there is: of the first prompts."""
        return tuple(self._scores.get(candidate.key, ()))

    def judged(self, candidate: Candidate, num_prompts: int) -> tuple[PromptScore, ...]:
        """Return the scores of at least the first `num_prompts` (or all), judging those that are missing."""
        scores = self._scores.setdefault(candidate.key, [])
        for prompt_idx in range(len(scores), min(num_prompts, self._judge.num_prompts)):
            scores.append(self._judge.score(candidate.spec, prompt_idx))
            self._note(self._split, candidate.key, score=asdict(scores[-1]))
        return tuple(scores)

    def _note(self, what: str, key: str, **row: object) -> None:
        if self._journal is not None:
            self._journal.append({"what": what, "candidate": key, **row})
