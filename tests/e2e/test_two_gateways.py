"""A cluster with two gateways: one is killed, and a client that knows both never notices but by a retry."""

import pytest

from tandem_client import Client
from tests.e2e.cluster_process import running_cluster, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


async def test_one_gateway_is_killed(tmp_path_factory: pytest.TempPathFactory) -> None:
    config = tiny_config("twins", replicas=1, router={"port": 0, "replicas": 2})
    async with running_cluster(tmp_path_factory.mktemp("run"), config) as cluster:
        assert {"gateway-0", "gateway-1"} <= cluster.pids.keys()
        assert cluster.address.count(",") == 1
        async with Client(cluster.address, max_retries=5) as client:
            first = [await client.generate_text("import os", temperature=0.0, max_tokens=8) for _ in range(4)]
            assert len({(await client.status()).gateway_id for _ in range(8)}) == 2
            cluster.kill("gateway-1")
            later = [await client.generate_text("import os", temperature=0.0, max_tokens=8) for _ in range(8)]
        assert len({generation.text for generation in first + later}) == 1
        await cluster.until_restarted("gateway-1")
