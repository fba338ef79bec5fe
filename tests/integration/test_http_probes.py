"""What Kubernetes and Prometheus ask."""

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as read_text

from core.errors import ConfigError
from core.membership import WorkerState
from router.http import reply_types as replies
from tests.fakes.cluster import fake_cluster
from tests.fakes.http import TEXT, http_client


async def test_probes_of_a_gateway_that_serves(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        for path in ("/live", "/ready", "/health"):
            response = await client.get(path)
            assert response.status_code == 200
            replies.Status.model_validate(response.json(), strict=True)
            head = await client.head(path)
            assert (head.status_code, head.content) == (200, b"")
        version = (await client.get("/version")).json()
        assert version["version"][0].isdigit()


async def test_readiness_follows_the_workers(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        await cluster.decodes[0].register(WorkerState.DRAINING)
        await cluster.wait_live(1)
        for path in ("/ready", "/health"):
            response = await client.get(path)
            assert (response.status_code, response.json()) == (503, {"status": "no workers"})
        assert (await client.get("/live")).status_code == 200
        await cluster.decodes[0].register(WorkerState.READY)
        await cluster.wait_live(2)
        assert (await client.get("/ready")).status_code == 200


async def test_metrics_in_both_formats(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        assert (await client.post("/v1/completions", json=TEXT)).status_code == 200
        plain = await client.get("/metrics")
        assert plain.headers["content-type"].startswith("text/plain; version=")
        families = {family.name: family for family in read_text(plain.text)}
        finished = [one for one in families["tandem_gateway_requests"].samples if one.name.endswith("_total")]
        assert [(sample.labels["outcome"], sample.value) for sample in finished] == [("finished", 1.0)]
        accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
        opened = await client.get("/metrics", headers={"accept": accept})
        assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        assert opened.text.endswith("# EOF\n")
        assert 'tandem_gateway_requests_total{outcome="finished",reason="length"} 1.0\n' in opened.text


async def test_responses_are_counted_by_route_and_status(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster, http_client(cluster) as client:
        for path in ("/v1/models/fake", "/v1/models/other", "/nowhere", "/elsewhere"):
            await client.get(path)
        await client.post("/v1/completions", json=TEXT | {"stream": True})
        await client.get("/v1/completions")
        count = cluster.gateway.metrics.registry.get_sample_value
        assert {
            (route, status): count("tandem_gateway_http_responses_total", {"route": route, "status": status})
            for route, status in (
                ("/v1/models/{model:path}", "200"),
                ("/v1/models/{model:path}", "404"),
                ("none", "404"),
                ("/v1/completions", "200"),
                ("/v1/completions", "405"),
            )
        } == {
            ("/v1/models/{model:path}", "200"): 1.0,
            ("/v1/models/{model:path}", "404"): 1.0,
            ("none", "404"): 2.0,
            ("/v1/completions", "200"): 1.0,
            ("/v1/completions", "405"): 1.0,
        }


async def test_a_port_that_is_taken_is_an_error(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint) as cluster:
        port = int(cluster.gateway.http_address.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"http: cannot listen on 127.0.0.1:{port}: Address already in use"):
            async with fake_cluster(checkpoint, http={"port": port}):
                raise AssertionError("it came up")


async def test_http_may_be_left_out(checkpoint: Path) -> None:
    async with fake_cluster(checkpoint, http={"enabled": False}) as cluster:
        assert cluster.gateway.http_address == ""
