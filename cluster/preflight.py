"""What can be known to be wrong before anything is started. Every problem is one line that names the key."""

import json
import math
import os
import socket
from pathlib import Path

import cluster
from cluster.config import ClusterConfig, TlsConfig
from cluster.placement import demands, shares
from core.config import load_config
from core.errors import ConfigError
from core.tls import Pem
from router.access.config import KeysFile


def check(config: ClusterConfig) -> None:
    """Look at the model, the log folder, the cores, certificates and keys, and where the gateways are to listen.

    Raises:
        ConfigError: the first problem.
    """
    if config.ray.address is None:  # elsewhere the nodes' own disks and cores count
        _check_model(config.model.path, dummy=config.model.load_format == "dummy")
        _check_length(config.model.path, config.model.max_model_len)
        if config.log_folder is not None:
            _check_log_folder(config.log_folder)
        _check_certificates(config.tls)
        if config.router.access.enabled and config.router.access.keys_file is not None:
            load_config(KeysFile, config.router.access.keys_file)
        # GPUs are counted by Ray, which knows every vendor's.
        shares(demands(config), cpus=len(os.sched_getaffinity(0)), gpus=math.inf, where="this machine")
    gateway = config.gateway()
    doors = [("router", gateway.host, gateway.port)]
    if gateway.http.enabled:
        doors.append(("router.http", gateway.http_host, gateway.http_port))
    for key, host, first in doors:
        for port in range(first, first + config.num_gateway_ports) if first else [0]:
            _check_port(key, host, port)


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


def _check_port(section: str, host: str, port: int) -> None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are no listener
            probe.bind(address)
    except OSError as error:
        key = f"{section}.port" if port and _is_ours(host) else f"{section}.host"
        raise ConfigError(f"{key}: cannot listen on {host}:{port}: {error.strerror or error}") from error


def _is_ours(host: str) -> bool:
    """Tell whether any port of `host` can be listened on."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _check_log_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"log_folder: cannot make {folder}: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"log_folder: {folder} is not writable")


def _check_certificates(tls: TlsConfig) -> None:
    try:
        if tls.public is not None:
            Pem.of_server(tls.public)
            Pem.of_client(tls.client)
        if tls.internal is not None:
            Pem.of_server(tls.internal.server)
    except ConfigError as error:
        raise ConfigError(f"the section {error}") from error


def _check_length(path: Path, wanted: int | None) -> None:
    """Compare with what the checkpoint states; what it states in other words the workers find out."""
    file = path if path.is_file() else path / "config.json"
    try:
        limit = json.loads(file.read_text(encoding="utf-8")).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"model.path: {file} is no JSON object that can be read") from error
    if wanted is not None and isinstance(limit, int) and wanted > limit:
        raise ConfigError(f"model.max_model_len: {wanted} is more than the model's own {limit}")


def packages_folder() -> Path:
    """Return the folder that holds our root packages: the repository, or site-packages."""
    return Path(cluster.__file__).resolve().parent.parent
