"""Every model family through real prefill and decode processes and a gateway: the tokens are those of transformers.

No Ray here: the workers are the programs `prefill_workers` and `decode_workers`, forked. Most prompts are longer than a
step's budget, so they are computed in chunks while KV crosses over gloo.
"""

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from core.clock import MonotonicClock
from core.membership import Role
from core.store_redis import RedisStore
from router.config import RouterConfig
from router.routing.config import RoutingConfig
from router.routing.modes import Mode
from router.service import Gateway
from tandem_client import Client, Generation
from tests import model_matrix
from tests.forked_workers import forked_worker
from tests.redis_process import RedisProcess

pytestmark = [pytest.mark.slow]

NEW_TOKENS = 12
PATIENCE_S = 60.0


def with_tokenizer(family: str, folder: Path) -> Path:
    """Return a checkpoint of `family` that a gateway can serve: any tokenizer does, for prompts of token ids."""
    path = model_matrix.checkpoint(family, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_matrix.TINY_PATH / name, path / name)
    return path


@contextlib.asynccontextmanager
async def served(model: Path, folder: Path) -> AsyncIterator[Client]:
    """A client of a gateway before one prefill and one decode process."""
    config = folder / "worker.yaml"
    engine = {"num_blocks": 160, "max_batch_tokens": 16, "num_threads": 1}
    config.write_text(yaml.safe_dump({"model": {"path": str(model), "dtype": "float32"}, "engine": engine}))
    with tempfile.TemporaryDirectory(prefix="tandem-test-") as sockets, RedisProcess(Path(sockets)) as redis:
        common = ("--config", str(config), "--redis-url", redis.url, "--drain-s", "1", "--log-level", "ERROR")
        async with (
            forked_worker(Role.PREFILL, "--worker-id", "p0", *common),
            forked_worker(Role.DECODE, "--worker-id", "d0", *common),
        ):
            store = RedisStore(redis.url)
            # The hand-off is the subject: every request takes it. The other modes are in tests/e2e/test_modes.py.
            routing = RoutingConfig(modes=(Mode.REMOTE_PREFILL,))
            gateway = Gateway(
                RouterConfig(model_path=model, port=0, routing=routing), "tandem", store, MonotonicClock()
            )
            address = await gateway.start()
            running = asyncio.create_task(gateway.run())
            try:
                async with Client(address) as client:
                    async with asyncio.timeout(PATIENCE_S):
                        while sum(one.connected for one in (await client.status()).workers) < 2:  # noqa: ASYNC110
                            await asyncio.sleep(0.05)
                    yield client
            finally:
                await gateway.stop(1.0)
                await running
                await store.close()


@pytest.mark.parametrize("family", list(model_matrix.FAMILIES))
async def test_greedy_equals_transformers(family: str, tmp_path: Path) -> None:
    model = with_tokenizer(family, tmp_path)
    prompts = model_matrix.prompts(model_matrix.VOCAB_SIZE)
    wanted = model_matrix.generate(model, prompts, NEW_TOKENS)
    async with served(model, tmp_path) as client:

        async def tokens_of(at: int) -> Generation:
            result = await client.generate_text(prompts[at], temperature=0.0, max_tokens=NEW_TOKENS, deadline_s=60.0)
            assert [token.token_id for token in result.tokens] == wanted[at], f"prompt {at}"
            return result

        cold = [await tokens_of(at) for at in range(0, 16, 4)]
        together = await asyncio.gather(*(tokens_of(at) for at in range(16)))
        again = await asyncio.gather(*(tokens_of(at) for at in range(16)))
        alone = [await tokens_of(at) for at in range(1, 16, 4)]
    assert not any(one.summary.usage.cached_tokens or one.summary.placement.kv_tokens_held for one in cold)
    assert any(len(prompts[at]) > 16 for at in range(0, 16, 4)), "no chunked prefill among the cold ones"
    for hits in (together, again, alone):
        assert any(one.summary.usage.cached_tokens for one in hits)
        assert any(one.summary.placement.kv_tokens_held for one in hits)
    assert sum(one.summary.placement.kv_bytes for one in [*cold, *together]) > 0
