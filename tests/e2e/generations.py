"""What end-to-end tests ask of a cluster, what the answers must be, and how a cluster at rest looks."""

import asyncio
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.request import MAX_LOGPROBS
from tandem_client import Client, ClusterStatus, Generation, ServingError, Token
from tests.e2e.cluster_process import ROOT, TINY, ClusterProcess

NEW_TOKENS = 24
PROMISE_S = 2.0  # a client learns of a death within this time
_LOAD_TOKENS = 1700
_STREAM_DEADLINE_S = 200.0  # longer than any test waits: a stream ends because of what was done to it
TEXT = (ROOT / "LICENSE").read_text()


def make_prompts() -> list[list[int]]:
    """Return sixteen, of 3 to 303 tokens; every other one shares a prefix with the one before."""
    ids = AutoTokenizer.from_pretrained(TINY)(TEXT, add_special_tokens=False)["input_ids"]
    return [ids[(n // 2) * 37 :][: 3 + 20 * n] for n in range(16)]


def by_transformers(prompts: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """Return what `transformers` generates, greedily, one by one."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    found = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
        found.append(out[0, len(prompt) :].tolist())
    return found


def ids_of(generation: Generation) -> list[int]:
    assert [token.index for token in generation.tokens] == list(range(len(generation.tokens)))
    return [token.token_id for token in generation.tokens]


def is_idle(status: ClusterStatus) -> bool:
    """All workers are there, nothing runs, and every block is free or holds evictable cache."""
    return (
        len(status.workers) == 4
        and not status.active_requests
        and all(
            worker.connected
            and worker.state == "ready"
            and worker.total_blocks > 0
            and worker.free_blocks == worker.total_blocks
            and worker.num_running == worker.num_waiting == worker.in_flight == 0
            for worker in status.workers
        )
    )


async def greedy(client: Client, prompt: Sequence[int]) -> Generation:
    return await client.generate_text(prompt, temperature=0.0, max_tokens=NEW_TOKENS, deadline_s=60.0)


class Stream:
    """One greedy generation under way."""

    def __init__(self, client: Client, prompt: Sequence[int], max_tokens: int = NEW_TOKENS) -> None:
        self.begun = asyncio.Event()
        self.task = asyncio.create_task(self._read(client, prompt, max_tokens))
        self.task.add_done_callback(lambda task: self.begun.set())

    async def _read(self, client: Client, prompt: Sequence[int], max_tokens: int) -> Generation:
        tokens: list[Token] = []
        texts: list[str] = []
        pieces = client.generate(prompt, temperature=0.0, max_tokens=max_tokens, deadline_s=_STREAM_DEADLINE_S)
        async for piece in pieces:
            tokens += piece.tokens
            texts.append(piece.text)
            if tokens:
                self.begun.set()
            if piece.summary is not None:
                return Generation("".join(texts), tuple(tokens), piece.summary)
        raise AssertionError("the stream ended without saying how")

    async def leave(self) -> None:
        """Disconnect, if it still streams."""
        self.task.cancel()
        await asyncio.wait([self.task])


async def until_begun(streams: Sequence[Stream]) -> None:
    """Wait until each has its first token, or has ended."""
    async with asyncio.timeout(60):
        await asyncio.gather(*(stream.begun.wait() for stream in streams))


class Load:
    """Long streams, all past their first token, whose ends a test can wait for.

    A context is not endless, and the tiny model fills one in seconds: many alternatives per token make them last.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self.tasks: list[asyncio.Task[None]] = []
        self.failures: asyncio.Queue[ServingError] = asyncio.Queue()

    async def start(self, prompts: Sequence[Sequence[int]]) -> None:
        begun = [asyncio.Event() for _ in prompts]
        for prompt, event in zip(prompts, begun, strict=True):
            self.tasks.append(asyncio.create_task(self._stream(prompt, event)))
        async with asyncio.timeout(60):
            await asyncio.gather(*(event.wait() for event in begun))

    async def _stream(self, prompt: Sequence[int], begun: asyncio.Event) -> None:
        index = 0
        try:
            async for piece in self._client.generate(
                prompt, temperature=0.0, max_tokens=_LOAD_TOKENS, ignore_eos=True, logprobs=MAX_LOGPROBS
            ):
                for token in piece.tokens:
                    assert token.index == index
                    index += 1
                if index > 1:
                    begun.set()
            assert index == _LOAD_TOKENS
        except ServingError as error:
            self.failures.put_nowait(error)

    async def failed_within(self, count: int, seconds: float) -> list[ServingError]:
        errors: list[ServingError] = []
        try:
            async with asyncio.timeout(seconds):
                while len(errors) < count:
                    errors.append(await self.failures.get())
        except TimeoutError:
            num_open = sum(not task.done() for task in self.tasks)
            raise AssertionError(f"{len(errors)} of {count} failed in time, {num_open} go on") from None
        return errors

    async def leave(self) -> None:
        """Disconnect whatever still streams."""
        for task in self.tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self.tasks, return_exceptions=True):
            assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome


async def assert_serves(cluster: ClusterProcess, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """New requests succeed, and in the end every block is back."""
    async with Client(cluster.address) as client:
        results = await asyncio.gather(*(greedy(client, prompt) for prompt in prompts))
    assert [ids_of(result) for result in results] == expected
    await cluster.until_status(is_idle)
