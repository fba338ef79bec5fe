"""What of a generation is certain text already: pieces for any surface, cut before a stop string. Pure."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from core.request import Finish, GenerateRequest, TokenOutput
from core.text import PROMPT_TAIL_TOKENS, NewDetokenizer, StopScanner

_NONE_SPOKEN: Mapping[int, str] = MappingProxyType({})


class GenerationText:
    """The text of one generation, piece by piece, cut before a stop string and without a stop token.

    Args:
        spoken: special tokens whose text is wanted, too. Stop strings are found as if it were not there, as the engine
            finds them.
    """

    def __init__(
        self, new_detokenizer: NewDetokenizer, request: GenerateRequest, spoken: Mapping[int, str] = _NONE_SPOKEN
    ) -> None:
        self._detokenizer = new_detokenizer(request.prompt_token_ids[-PROMPT_TAIL_TOKENS:])
        self._scanner = StopScanner(request.sampling.stop)
        self._by_token = bool(request.sampling.stop) or bool(spoken)
        self._spoken = spoken
        self._waiting: list[tuple[int, str]] = []  # where in the text a special token's own comes, and that
        self._num_read = self._num_shown = 0

    def push(self, tokens: Sequence[TokenOutput], finish: Finish | None) -> str:
        """Add tokens (`finish`: they are the last); return the text that became certain."""
        ids = [token.token_id for token in tokens]
        if finish is None and not self._by_token:
            return self._detokenizer.push(ids)
        if finish is not None and isinstance(finish.matched_stop, int) and ids and ids[-1] == finish.matched_stop:
            ids.pop()  # it ended the generation; it is no text
        # The engine looked for stop strings after every token, so the pieces must be the same here.
        steps = [[one] for one in ids] if self._by_token else [ids] if ids else []
        text = "".join([self._step(step) for step in steps])
        if finish is None:
            return text
        text += self._show(self._scan(self._detokenizer.flush()))
        is_cut = isinstance(finish.matched_stop, str)
        return text if is_cut else text + self._show(self._scanner.flush())

    def _step(self, ids: Sequence[int]) -> str:
        text = self._scan(self._detokenizer.push(ids))
        if self._spoken and ids[0] in self._spoken and self._scanner.matched is None:
            self._waiting.append((self._num_read, self._spoken[ids[0]]))
        return self._show(text) if self._spoken else text

    def _scan(self, text: str) -> str:
        self._num_read += len(text)
        return self._scanner.push(text)

    def _show(self, text: str) -> str:
        """Put the special tokens into `text`, the next that is certain."""
        start, self._num_shown = self._num_shown, self._num_shown + len(text)
        parts: list[str] = []
        at = 0
        while self._waiting and self._waiting[0][0] <= self._num_shown:
            place, spoken = self._waiting.pop(0)
            parts += (text[at : place - start], spoken)
            at = place - start
        return "".join([*parts, text[at:]]) if parts else text
