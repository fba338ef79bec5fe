"""What can be known to be wrong before anything is started. Every problem is one line that names the key."""

import math
import os
import socket
from pathlib import Path

import cluster
from cluster.config import ClusterConfig
from cluster.placement import demands, shares
from core.errors import ConfigError


def check(config: ClusterConfig) -> None:
    """Look at the model path, the cores and the gateway's port.

    Raises:
        ConfigError: the first problem.
    """
    if config.ray.address is None:  # elsewhere the nodes' own disks and cores count
        _check_model(config.model.path, dummy=config.model.load_format == "dummy")
        # GPUs are counted by Ray, which knows every vendor's.
        shares(demands(config), cpus=len(os.sched_getaffinity(0)), gpus=math.inf, where="this machine")
    _check_port(config.gateway().host, config.gateway().port)


def _check_model(path: Path, *, dummy: bool) -> None:
    if not path.exists():
        raise ConfigError(f"model.path: {path} does not exist")
    if path.is_file():
        if not dummy:
            raise ConfigError(f"model.path: {path} is a file; it must be a checkpoint folder")
        return
    if not (path / "config.json").is_file():
        raise ConfigError(f"model.path: {path} has no config.json; it must be a checkpoint in Hugging Face layout")
    if not dummy and not any(path.glob("*.safetensors")):
        raise ConfigError(f"model.path: {path} has no *.safetensors weights")


def _check_port(host: str, port: int) -> None:
    if port == 0:
        return
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are no listener
            probe.bind(address)
    except OSError as error:
        raise ConfigError(f"router.port: cannot listen on {host}:{port}: {error.strerror or error}") from error


def packages_folder() -> Path:
    """Return the folder that holds our root packages: the repository, or site-packages."""
    return Path(cluster.__file__).resolve().parent.parent
