"""The cluster's YAML: composition, refusals with dotted paths, and who gets how much of the machine."""

import pickle
from pathlib import Path

import pytest

from cluster.config import ClusterConfig, load_cluster_config
from cluster.placement import CoreMap, Demand, demands, shares
from core.config import parse_config
from core.errors import ConfigError
from core.ids import WorkerId

ROOT = Path(__file__).resolve().parents[2]


def parse(**data: object) -> ClusterConfig:
    return parse_config(ClusterConfig, {"model": {"path": "m"}} | data, source="c.yaml")


def test_the_example_is_valid_and_its_model_path_is_relative_to_it() -> None:
    config = load_cluster_config(ROOT / "examples" / "cluster.yaml")
    assert config.model.path.resolve() == ROOT / "models" / "tiny"
    assert (config.prefill.replicas, config.decode.replicas) == (2, 2)


@pytest.mark.parametrize(
    ("given", "meant"), [("auto", "auto"), ("none", "none"), ("lib.yaml", "{folder}/lib.yaml"), ("/l.yaml", "/l.yaml")]
)
def test_a_library_of_profiles_is_relative_to_the_file(given: str, meant: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(f"model: {{path: m}}\ntransfer: {{profiles: {given}}}\n")
    assert load_cluster_config(path).transfer.profiles == meant.format(folder=tmp_path)


def test_the_gateway_knows_the_quality_that_transfers_have_by_default() -> None:
    config = parse(transfer={"quality": "high"}, router={"tenants": {"bank": {"kv_quality": 1.0}}})
    gateway = config.gateway()
    assert (gateway.kv_quality, gateway.tenants["bank"].kv_quality) == ("high", 1.0)
    with pytest.raises(ConfigError, match="kv_quality: unknown key"):
        parse(router={"kv_quality": "high"})


def test_workers_get_the_shared_sections_and_their_own() -> None:
    config = parse(
        transfer={"slot_bytes": 65536},
        prefill={"engine": {"block_size": 32}, "max_queued_tokens": 7},
        decode={"max_requests": 9},
    )
    prefill = config.prefill_worker(host="10.0.0.1")
    assert (prefill.model, prefill.transfer.slot_bytes, prefill.host) == (config.model, 65536, "10.0.0.1")
    assert (prefill.engine.block_size, prefill.max_queued_tokens) == (32, 7)
    assert config.decode_worker().max_requests == 9
    assert config.decode_worker().engine.block_size == 16


def test_metrics_are_off_unless_a_port_is_asked_for_and_0_asks_for_a_free_one() -> None:
    config = parse()
    for service in (config.prefill_worker(), config.decode_worker(), config.gateway()):
        assert service.metrics_port is None
    asked = {"metrics_port": 0}
    config = parse(prefill=asked, decode=asked, router=asked)
    for service in (config.prefill_worker(), config.decode_worker(), config.gateway()):
        assert service.metrics_port == 0


def test_the_gateway_serves_the_model() -> None:
    config = parse(model={"path": "models/tiny", "max_model_len": 512}, router={"routing": {"temperature": 0.5}})
    gateway = config.gateway(port=7)
    assert (gateway.port, gateway.model_name, gateway.max_model_len) == (7, "tiny", 512)
    assert gateway.routing.temperature == 0.5


def test_survives_a_pickle() -> None:
    config = parse(prefill={"replicas": 3})
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"prefil": {}}, "prefil: unknown key"),
        ({"prefill": {"engine": {"blok_size": 1}}}, "prefill.engine.blok_size: unknown key"),
        ({"prefill": {"model": {"path": "x"}}}, "prefill.model: unknown key"),
        ({"decode": {"replicas": 0}}, "decode.replicas: Input should be greater than or equal to 1"),
        ({"router": {"model_path": "x"}}, "router.model_path: unknown key"),
        ({"router": {"port": 70000}}, "router.port: Input should be less than or equal to 65535"),
        (
            {"router": {"port": 65535, "replicas": 2}},
            "(top level): Value error, router.replicas: there are no 2 ports from router.port on",
        ),
        (
            {"router": {"metrics_port": 65535, "replicas": 2}},
            "(top level): Value error, router.replicas: there are no 2 ports from router.metrics_port on",
        ),
        ({"transfer": {"slot_bytes": 1}}, "transfer.slot_bytes: Input should be greater than or equal to 4096"),
        ({"redis": {"url": "localhost"}}, "redis.url: String should match pattern"),
        ({"ray": {"address": "ray://h:1"}}, "ray.address: Value error, must be host:port"),
        ({"name": "Bad Name"}, "name: String should match pattern"),
        ({"supervision": {"back_off": {"base_s": 5, "max_s": 1}}}, "supervision.back_off: Value error, max_s must"),
    ],
)
def test_refusals_name_the_dotted_path(data: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**data)
    assert str(caught.value).startswith(f"c.yaml: {problem}")
    assert "\n" not in str(caught.value)


def two_pools(prefill: Demand, decode: Demand) -> dict[str, Demand]:
    return {"prefill": prefill, "decode": decode}


@pytest.mark.parametrize(
    ("prefill", "decode", "cpus", "expected"),
    [
        pytest.param((2, None), (2, None), 2, (0.5, 0.5), id="four share two cores"),
        pytest.param((2, None), (1, None), 2, (0.666, 0.666), id="a share is rounded down"),
        pytest.param((2, None), (2, None), 17, (4.0, 4.0), id="whole cores when there are enough"),
        pytest.param((1, 4.0), (2, None), 8, (4.0, 2.0), id="the rest is shared"),
        pytest.param((2, 1.0), (2, None), 2, (1.0, 0.0), id="nothing left to share"),
    ],
)
def test_shares(
    prefill: tuple[int, float | None],
    decode: tuple[int, float | None],
    cpus: float,
    expected: tuple[float, float],
) -> None:
    wanted = two_pools(Demand("prefill", *prefill, 0.0), Demand("decode", *decode, 0.0))
    got = shares(wanted, cpus=cpus, gpus=0, where="here")
    assert (got["prefill"], got["decode"]) == expected
    assert prefill[0] * got["prefill"] + decode[0] * got["decode"] <= cpus


@pytest.mark.parametrize(
    ("num_cpus", "num_gpus", "problem"),
    [
        (3.0, 0.0, "not enough CPUs: asked for 6 (prefill 6), here has 4"),
        (None, 1.5, "not enough GPUs: asked for 3 (prefill 3), here has 1"),
    ],
)
def test_too_much_is_refused(num_cpus: float | None, num_gpus: float, problem: str) -> None:
    wanted = two_pools(Demand("prefill", 2, num_cpus, num_gpus), Demand("decode", 1, None, 0.0))
    with pytest.raises(ConfigError) as caught:
        shares(wanted, cpus=4, gpus=1, where="here")
    assert str(caught.value) == f"resources: {problem}"


def test_a_gpu_per_worker_is_the_default_on_cuda() -> None:
    assert demands(parse(model={"path": "m", "device": "cuda"}))["decode"].num_gpus == 1.0
    assert demands(parse())["decode"].num_gpus == 0.0
    half = parse(model={"path": "m", "device": "cuda"}, decode={"resources": {"num_gpus": 0.5}})
    assert demands(half)["decode"].num_gpus == 0.5


def test_whole_cores_are_pinned_once_and_come_back_with_a_restart() -> None:
    cores, node = CoreMap(), frozenset(range(4))
    a, b, c = WorkerId("a"), WorkerId("b"), WorkerId("c")
    assert cores.take(a, "n1", node, 2.0) == {0, 1}
    assert cores.take(b, "n1", node, 2.0) == {2, 3}
    assert cores.take(c, "n1", node, 1.0) == frozenset(), "none left: not pinned"
    assert cores.take(c, "n2", node, 1.0) == {0}, "another node has its own"
    assert cores.take(a, "n1", node, 2.0) == {0, 1}, "restarted"
    assert cores.take(b, "n1", node, 0.5) == frozenset(), "a share is not pinned"
    assert cores.take(c, "n1", node, 2.0) == {2, 3}
