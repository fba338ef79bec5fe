"""What of a generation is certain text already: pieces for any surface, cut before a stop string. Pure."""

from collections.abc import Callable, Sequence

from core.request import Finish, GenerateRequest, TokenOutput
from core.text import IncrementalDetokenizer, StopScanner

_PROMPT_TAIL_TOKENS = 8  # as the engine does, so that both see the same text


class GenerationText:
    """The text of one generation, piece by piece, cut before a stop string and without a stop token."""

    def __init__(self, decode: Callable[[Sequence[int]], str], request: GenerateRequest) -> None:
        self._detokenizer = IncrementalDetokenizer(decode, request.prompt_token_ids[-_PROMPT_TAIL_TOKENS:])
        self._scanner = StopScanner(request.sampling.stop)
        self._has_stops = bool(request.sampling.stop)

    def push(self, tokens: Sequence[TokenOutput], finish: Finish | None) -> str:
        """Add tokens (`finish`: they are the last); return the text that became certain."""
        ids = [token.token_id for token in tokens]
        if finish is not None and isinstance(finish.matched_stop, int) and ids and ids[-1] == finish.matched_stop:
            ids.pop()  # it ended the generation; it is no text
        # The engine looked for stop strings after every token, so the pieces must be the same here.
        steps = [[one] for one in ids] if self._has_stops else [ids] if ids else []
        text = "".join(self._scanner.push(self._detokenizer.push(step)) for step in steps)
        if finish is None:
            return text
        text += self._scanner.push(self._detokenizer.flush())
        return text if isinstance(finish.matched_stop, str) else text + self._scanner.flush()
