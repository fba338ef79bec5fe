"""From what a client asked to a request that workers can run: checks, tokenises, fills in what was left open.

Everything that is wrong with a request is found here, before it takes a place anywhere, and named by field.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from core.errors import InvalidRequest, ModelNotFound, PromptTooLong, RejectedError, RejectReason
from core.ids import new_request_id, parse_request_id, parse_tenant
from core.request import MAX_SEED, GenerateRequest, SamplingParams
from core.violations import Violations
from grammar.service import GrammarService
from router.chat.messages import ChatMessage, Tool, chat_size, check_messages
from router.config import RouterConfig
from router.kv_terms import NO_WISH, KvWish, kv_terms
from router.prompt_hashes import HashKey, PromptHashes
from router.service_terms import NO_SERVICE_WISH, ServiceTerms, ServiceWish, service_terms
from router.tokenizer import GatewayTokenizer, ModelFacts

_TOKENIZER_THREADS = 2
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """`with_markers`: the tokenizer puts its own around it, such as one for the beginning."""

    text: str
    with_markers: bool = True


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What the chat template gets; `template_arguments`: a JSON object as text, or empty."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()
    template_arguments: str = ""


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """What a client asked for, as any surface understood it.

    Attributes:
        request_id: empty: one is made.
        sampling: its `max_tokens` and `seed` count only when the flags say that the client gave them.
        n: answers to the prompt; answer i is sampled with the seed + i.
        resume_window_s: above 0, the answer outlives its connection for so long, to be read on.
        spoken_tokens: special tokens that are part of the answer's text, by id. Workers need not know.
    """

    model: str
    request_id: str
    prompt: Prompt | None
    sampling: SamplingParams
    has_max_tokens: bool
    has_seed: bool
    tenant: str = ""
    kv: KvWish = NO_WISH
    service: ServiceWish = NO_SERVICE_WISH
    n: int = 1
    resume_window_s: float | None = None
    spoken_tokens: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request, what it is for, and its block hashes."""

    request: GenerateRequest
    service: ServiceTerms
    hashes: PromptHashes


def check_prompt_fits(num_prompt_tokens: int, longest: int) -> None:
    """Raises: PromptTooLong, unless there is room for one token after the prompt."""
    if num_prompt_tokens >= longest:
        raise PromptTooLong("prompt", f"has {num_prompt_tokens} tokens, the context holds {longest}")


class Intake:
    """Checks and tokenises.

    Args:
        grammars: judges constraints.
        max_model_len: how long a request may become in the cluster as it is now.
        hash_keys: the ways to hash that workers use now.

    Concurrency: event loop; long prompts are encoded in threads of its own.
    """

    def __init__(
        self,
        config: RouterConfig,
        tokenizer: GatewayTokenizer,
        facts: ModelFacts,
        rng: random.Random,
        *,
        grammars: GrammarService,
        max_model_len: Callable[[], int],
        hash_keys: Callable[[], set[HashKey]],
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._facts = facts
        self._rng = rng
        self._grammars = grammars
        self._max_model_len = max_model_len
        self._hash_keys = hash_keys
        self._num_preparing = 0
        self._threads = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenizer")

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def check_model(self, name: str) -> None:
        """Raises: ModelNotFound, unless `name` is empty or the model served."""
        if name and name != self._config.model_name:
            raise ModelNotFound(f"model {name!r} is not served here; {self._config.model_name!r} is")

    async def prepare(self, call: GenerateCall) -> Prepared:
        """Check `call` and make a request of it.

        Raises:
            ModelNotFound, InvalidRequest, PromptTooLong
            RejectedError: QUEUE_FULL, too many are being prepared.
        """
        with self._place():
            prepared = await self._prepare(call)
        if call.sampling.constraint is not None:  # last, and in nobody's place: it may take seconds
            await self._grammars.check(call.sampling.constraint)
        return prepared

    async def _prepare(self, call: GenerateCall) -> Prepared:
        self.check_model(call.model)
        request_id = parse_request_id(call.request_id) if call.request_id else new_request_id()
        tenant = parse_tenant(call.tenant)
        longest = self._max_model_len()
        # Checked first with any legal length: a bad parameter should not cost a tokenisation.
        sampling = call.sampling
        if not call.has_max_tokens:
            sampling = replace(sampling, max_tokens=max(self._config.default_max_tokens, sampling.min_tokens, 1))
        found = Violations()
        with found.collecting():
            terms = kv_terms(call.kv, tenant, self._config)
        with found.collecting():
            service = service_terms(call.service, tenant, self._config)
        with found.collecting():
            sampling.check(self._facts.vocab_size)
        found.check()
        token_ids = tuple(await self._tokenize(call.prompt))
        max_tokens = self._fit(len(token_ids), sampling, longest, call.has_max_tokens)
        seed = sampling.seed if call.has_seed else self._rng.randrange(MAX_SEED)
        request = GenerateRequest(
            request_id,
            token_ids,
            replace(sampling, max_tokens=max_tokens, seed=seed),
            tenant=tenant,
            shared_salt=self._config.shared_salt(tenant),
            kv_quality_floor=terms.quality_floor,
            handoff_budget_s=terms.handoff_budget_s,
        )
        hashes = PromptHashes(token_ids, salt=request.cache_salt)
        if len(token_ids) * 4 > self._config.inline_prompt_bytes:
            keys = self._hash_keys()
            await self._in_thread(lambda: [hashes.of(key) for key in keys])
        return Prepared(request, service, hashes)

    async def tokenize(self, prompt: Prompt | None) -> list[int]:
        """Return the prompt's token ids: at least one, all in the vocabulary.

        Raises:
            InvalidRequest: it is missing, empty, too large in bytes, or cannot be rendered.
            RejectedError: QUEUE_FULL, too many are being prepared.
        """
        with self._place():
            return await self._tokenize(prompt)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """Return the text of ids, special tokens left out. No ids are no text.

        Raises:
            InvalidRequest: one is not in the vocabulary, or they are more than the largest prompt has bytes.
            RejectedError: QUEUE_FULL, too many are being prepared.
        """
        if not token_ids:
            return ""
        if len(token_ids) > self._config.max_prompt_bytes:
            bound = self._config.max_prompt_bytes
            raise InvalidRequest("ids", f"has {len(token_ids)} tokens, at most {bound} are allowed")
        with self._place():
            self._check_ids("ids", token_ids)
            if len(token_ids) * 4 <= self._config.inline_prompt_bytes:
                return self._tokenizer.decode(token_ids)
            return await self._in_thread(lambda: self._tokenizer.decode(token_ids))

    async def work_on(self, name: str, num_bytes: int, work: Callable[[], T]) -> T:
        """Do what a text of so many bytes needs before it is a prompt, off the event loop if it is large.

        Raises:
            InvalidRequest: naming `name`: it is larger than any prompt may be.
            RejectedError: QUEUE_FULL, too many are being prepared.
        """
        with self._place():
            return await self._beside_the_loop(name, num_bytes, work)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """Count as one who is being prepared."""
        if self._num_preparing >= self._config.max_preparing:
            bound = f"{self._config.max_preparing} prompts are being tokenised"
            raise RejectedError(RejectReason.QUEUE_FULL, bound, self._config.retry_max_s)
        self._num_preparing += 1
        try:
            yield
        finally:
            self._num_preparing -= 1

    async def _tokenize(self, prompt: Prompt | None) -> list[int]:
        match prompt:
            case TokenPrompt(token_ids):
                if not token_ids:
                    raise InvalidRequest("token_ids", "must not be empty")
                self._check_ids("token_ids", token_ids)
                return list(token_ids)
            case TextPrompt(text, with_markers):
                if not text:
                    raise InvalidRequest("text", "must not be empty")
                encode = partial(self._tokenizer.encode, text, with_markers=with_markers)
                return await self._encode("text", _size(text), encode)
            case ChatPrompt(messages, tools, arguments):
                check_messages(messages, "chat.messages")
                size = chat_size(messages, tools, arguments)
                return await self._encode("chat", size, lambda: self._tokenizer.encode_chat(messages, tools, arguments))
            case None:
                raise InvalidRequest("prompt", "is missing: set text, token_ids or chat")

    async def _encode(self, name: str, num_bytes: int, encode: Callable[[], list[int]]) -> list[int]:
        ids = await self._beside_the_loop(name, num_bytes, encode)
        if not ids:
            raise InvalidRequest(name, "has no tokens")
        return ids

    async def _beside_the_loop(self, name: str, num_bytes: int, work: Callable[[], T]) -> T:
        """Do what takes the longer the larger a text is: in a thread, unless that is small."""
        if num_bytes > self._config.max_prompt_bytes:
            raise InvalidRequest(name, f"has {num_bytes} bytes, at most {self._config.max_prompt_bytes} are allowed")
        return work() if num_bytes <= self._config.inline_prompt_bytes else await self._in_thread(work)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _check_ids(self, name: str, token_ids: tuple[int, ...]) -> None:
        for extreme in (min(token_ids), max(token_ids)):
            if not 0 <= extreme < self._facts.vocab_size:
                raise InvalidRequest(name, f"{extreme} is outside the vocabulary of {self._facts.vocab_size}")

    def _fit(self, num_prompt_tokens: int, sampling: SamplingParams, longest: int, is_asked: bool) -> int:
        check_prompt_fits(num_prompt_tokens, longest)
        room = longest - num_prompt_tokens
        if sampling.min_tokens > room or (is_asked and sampling.max_tokens > room):
            name = "min_tokens" if sampling.min_tokens > room else "max_tokens"
            problem = f"{num_prompt_tokens} prompt tokens leave room for {room} in a context of {longest}"
            raise PromptTooLong(f"sampling.{name}", problem)
        return sampling.max_tokens if is_asked else min(room, sampling.max_tokens)


def _size(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest("text", f"is no valid Unicode text: {error.reason}") from error
