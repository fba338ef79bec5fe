"""What a call comes to: `usage`, its tokens, and `tandem`, how it was served. A prompt counts once, whatever the number
of its answers."""

from typing import Any

from router.generation.answer import Answer
from router.generation.metadata import response_metadata
from router.stream import Completion


class UsageCount:
    """Counts while an answer is read; keeps what its end says.

    Args:
        is_prompt_only: what was generated is not told, so it does not count.
    """

    def __init__(self, answer: Answer, num_choices: int, *, is_prompt_only: bool = False) -> None:
        self._prompt_tokens = sum(request.num_prompt_tokens for request in answer.requests)
        self._num_choices = num_choices
        self._is_prompt_only = is_prompt_only
        self._completion_tokens = 0
        self._answer = answer
        self._completions: dict[int, Completion] = {}
        self._cached: dict[int, int] = {}  # by prompt: the first of its answers found the others' prompt in no cache

    def add(self, choice: int, num_tokens: int, completion: Completion | None) -> None:
        if not self._is_prompt_only:
            self._completion_tokens += num_tokens
        if completion is not None:
            self._completions[choice] = completion
            prompt = choice // self._num_choices
            self._cached[prompt] = min(completion.cached_tokens, self._cached.get(prompt, completion.cached_tokens))

    @property
    def is_complete(self) -> bool:
        """Every choice is over."""
        return len(self._completions) == len(self._answer.requests) * self._num_choices

    def account(self) -> dict[str, Any]:
        """Return how the choices that are over were served: `tandem` of a reply."""
        return response_metadata(self._answer, self._completions)

    def told(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }
