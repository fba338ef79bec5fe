"""What a request must satisfy before the engine takes it, and the sequence it becomes. Keeps nothing."""

from core.blocks import hash_namespace, num_blocks
from core.errors import InvalidRequest, PromptTooLong
from core.request import GenerateRequest
from core.text import NewDetokenizer
from engine.checkpoint import ModelInfo
from engine.sampler import SamplingState
from engine.sequence import SequenceState, TokenSequence
from engine.stops import StopChecker, TextStops


class Intake:
    """Judges requests against one model and one pool."""

    def __init__(
        self, info: ModelInfo, *, block_size: int, num_blocks: int, new_detokenizer: NewDetokenizer | None
    ) -> None:
        self._info = info
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._new_detokenizer = new_detokenizer

    def sequence(
        self, request: GenerateRequest, *, arrival: int, state: SequenceState, is_prefill: bool = False
    ) -> TokenSequence:
        """Check `request` and build its sequence.

        Args:
            state: WAITING or RESERVED.
            is_prefill: only the prompt is computed here, so only the prompt must fit.
        Raises:
            InvalidRequest: a field can never work; names it.
            PromptTooLong: the model's context or the whole pool is too small for it, even alone.
        """
        info, params = self._info, request.sampling
        _check_prompt(request.prompt_token_ids, info.vocab_size)
        params.check(info.vocab_size)
        if params.stop and self._new_detokenizer is None:
            raise InvalidRequest("sampling.stop", "this model has no tokenizer, so text cannot be searched")
        prompt = request.num_prompt_tokens
        if prompt >= info.max_model_len:
            raise PromptTooLong(
                "prompt_token_ids", f"{prompt} tokens leave no room in a context of {info.max_model_len}"
            )
        max_new_tokens = min(params.max_tokens, info.max_model_len - prompt)
        # The KV of the last generated token is never needed; a reservation has room for one token after the prompt.
        held = prompt if is_prefill else prompt + max(max_new_tokens - 1, state is SequenceState.RESERVED)
        if num_blocks(held, self._block_size) > self._num_blocks:
            raise PromptTooLong(
                "prompt_token_ids",
                f"prompt and max_tokens need {held} tokens of KV, "
                f"the whole pool holds {self._num_blocks * self._block_size}",
            )
        sampling = SamplingState(params, request.prompt_token_ids, info.eos_token_ids)
        text = None
        if params.stop and self._new_detokenizer is not None:
            text = TextStops(self._new_detokenizer, request.prompt_token_ids)
        return TokenSequence(
            request,
            arrival=arrival,
            state=state,
            block_size=self._block_size,
            max_tokens=prompt + max_new_tokens,
            namespace=hash_namespace(info.weights_version, adapter=request.adapter, tenant_salt=request.cache_salt),
            sampling=sampling,
            stops=StopChecker(params, max_new_tokens=max_new_tokens, end_token_ids=sampling.end_token_ids, text=text),
            is_prefill=is_prefill,
        )


def _check_prompt(token_ids: tuple[int, ...], vocab_size: int) -> None:
    if not token_ids:
        raise InvalidRequest("prompt_token_ids", "must hold at least one token")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise InvalidRequest("prompt_token_ids", f"token ids must be in [0, {vocab_size})")
