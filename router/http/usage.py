"""`usage`: how many tokens a call had. A prompt counts once, whatever the number of its answers."""

from typing import Any

from router.generation.answer import Answer
from router.stream import Completion


class UsageCount:
    """Counts while an answer is read.

    Args:
        is_prompt_only: what was generated is not told, so it does not count.
    """

    def __init__(self, answer: Answer, num_choices: int, *, is_prompt_only: bool = False) -> None:
        self._prompt_tokens = sum(request.num_prompt_tokens for request in answer.requests)
        self._num_choices = num_choices
        self._is_prompt_only = is_prompt_only
        self._completion_tokens = 0
        self._cached: dict[int, int] = {}  # by prompt: the first of its answers found the others' prompt in no cache

    def add(self, choice: int, num_tokens: int, completion: Completion | None) -> None:
        if not self._is_prompt_only:
            self._completion_tokens += num_tokens
        if completion is not None:
            prompt = choice // self._num_choices
            self._cached[prompt] = min(completion.cached_tokens, self._cached.get(prompt, completion.cached_tokens))

    def told(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }
