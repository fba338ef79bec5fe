"""What is refused before anything is started, and by which key."""

import socket
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.preflight import check, packages_folder
from core.config import parse_config
from core.errors import ConfigError

TINY = packages_folder() / "models" / "tiny"


def parse(**data: object) -> ClusterConfig:
    return parse_config(ClusterConfig, {"model": {"path": TINY}, "router": {"port": 0}} | data, source="c.yaml")


def test_a_good_one_passes(tmp_path: Path) -> None:
    check(parse(log_folder=tmp_path / "logs"))


@pytest.mark.parametrize("port", [0, 50051])
def test_a_host_of_another_machine(port: int) -> None:
    with pytest.raises(ConfigError, match=r"^router\.host: cannot listen on 192\.0\.2\.1:"):
        check(parse(router={"host": "192.0.2.1", "port": port}))


def test_a_busy_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=r"^router\.port: cannot listen on"):
            check(parse(router={"port": port}))


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_busy_port_of_http(replicas: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        first = server.getsockname()[1] - replicas + 1
        with pytest.raises(ConfigError, match=r"^router\.http\.port: cannot listen on"):
            check(parse(router={"port": 0, "replicas": replicas, "http": {"port": first}}))


def test_a_busy_port_of_http_that_is_not_served() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check(parse(router={"port": 0, "http": {"enabled": False, "port": server.getsockname()[1]}}))


def test_longer_than_the_model() -> None:
    with pytest.raises(ConfigError, match=r"^model\.max_model_len: 4096 is more than the model's own 2048$"):
        check(parse(model={"path": TINY, "max_model_len": 4096}))


def test_a_log_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^log_folder: cannot make "):
        check(parse(log_folder=tmp_path / "file" / "logs"))
