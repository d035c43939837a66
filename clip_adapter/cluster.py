"""Tasks on the nodes of a Ray cluster, and their results in the order of the tasks.

What was running on a worker or a node that is lost runs again elsewhere. Nothing is kept in the
cluster: whoever calls keeps results on disk and goes on from those.
"""

import logging
import os
import re
import secrets
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

from clip_adapter.cores import available_cores
from clip_adapter.errors import UserError
from clip_adapter.listener import Listener
from clip_adapter.words import quoted, shortened

AUTO, LOCAL = "auto", "local"
AHEAD = 64  # tasks that run, wait, or are finished and not yet asked for
REACHED_SECONDS = 5.0
# Without keepalives a driver waits for ever for a host that drops off the network. All of these are
# read as Ray is imported; what the user has set stays.
ENVIRONMENT = {
    "RAY_grpc_client_keepalive_time_ms": "3000",
    "RAY_grpc_client_keepalive_timeout_ms": "3000",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# So that a worker which is kept sees every GPU: the next task may be given another.
EVERY_GPU = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
# The beginning of HTTP/2, which gRPC speaks, and an empty frame of settings (type 4).
HTTP2, SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0\0\0\4\0\0\0\0\0"


def check_address(address: str) -> None:
    """Raises UserError for what names no cluster, and without the package."""
    named = re.fullmatch(r"[^\s:/]+:([0-9]{1,5})", address)
    if address not in (AUTO, LOCAL) and not (named and 0 < int(named[1]) < 2**16):
        raise UserError(f"--ray takes auto, local or HOST:PORT, not {quoted(address)}.")
    if find_spec("ray") is None:
        raise UserError("--ray needs the package ray: pip install 'clip-adapter[ray]'.")


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to. cores, gpus: of all its nodes at first."""

    cores: int
    gpus: int

    def results(
        self,
        function: Callable[..., Any],
        calls: Iterable[tuple[Any, ...]],
        *,
        gpu: bool = False,
        kept: bool = True,
    ) -> Iterator[Any]:
        """What `function`, of an importable module, gives for each of the calls, in order.

        calls: taken as tasks are begun. gpu: each has a GPU of its own. kept: a worker takes one
            task after another; with GPUs it then sees all of them, and takes the one it is given.
        Raises the UserError that a call raises, and one where the cluster fails.
        """
        import ray

        how: dict[str, Any] = {"num_gpus": 1} if gpu else {}
        if gpu and kept:
            how["runtime_env"] = {"env_vars": EVERY_GPU}
        how |= {"max_calls": 0 if kept else 1, "scheduling_strategy": "SPREAD"}
        remote = ray.remote(num_cpus=1, max_retries=-1, **how)(_outcome)
        most = max(AHEAD, 2 * (self.gpus if gpu else self.cores))
        running: deque[Any] = deque()
        for call in calls:
            running.append(remote.remote(function, *call))
            if len(running) >= most:
                yield _result(running.popleft())
        while running:
            yield _result(running.popleft())

    def put(self, value: Any) -> Any:
        """The same for several calls, sent to each node once."""
        import ray

        return ray.put(value)


def _outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a worker. An error that is raised there would become one of Ray's kinds."""
    try:
        return function(*arguments)
    except UserError as error:
        return error


def _result(task: Any) -> Any:
    import ray

    try:
        outcome = ray.get(task)
    except ray.exceptions.RayTaskError:  # a mistake in this program, with its traceback
        raise
    except ray.exceptions.RayError as error:
        raise UserError(
            f"The Ray cluster failed ({_reason(error)}); what is finished is kept, and the same "
            "command goes on from there."
        ) from error
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def _reason(error: Exception) -> str:
    return shortened(" ".join(str(error).split()), 300).rstrip(".")


def this_node() -> str:
    """In a worker: the name of its machine, for sentences."""
    import ray

    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"


@contextmanager
def connected(address: str, listener: Listener) -> Iterator[Cluster]:
    """The cluster at an address, or one on this machine alone while the context lasts.

    address: `auto` (RAY_ADDRESS, or what was started on this machine), HOST:PORT, or `local`.
    listener: hears of nodes that are lost.
    Raises UserError where there is none, or none with a core for tasks.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    how: dict[str, Any] = {"address": address}
    if address == LOCAL:
        # Else Ray leaves a token in the home folder, which later clusters would demand.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        how |= {"num_cpus": available_cores(), "include_dashboard": False}
    # The variable would go before an address that is given.
    stated = {} if address in (AUTO, LOCAL) else {"RAY_ADDRESS": address}
    import ray

    def tell(data: Mapping[str, Any], **_: Any) -> None:
        for text in data["lines"]:  # with pages of a log below
            listener.note(f"Ray: {shortened(text.strip().partition(chr(10))[0], 200)}")

    # Ray would print what it says of nodes among the results, on standard output.
    printing = patch("ray._private.worker.print_to_stdstream", tell, create=True)
    try:
        with printing, patch.dict(os.environ, stated):
            if address != LOCAL:
                _refuse_unreachable(address)
            ray.init(**how, log_to_driver=False, logging_level=logging.ERROR)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"--ray {address} cannot be used ({_reason(error)}); RAY_AUTH_MODE, the token and the "
            "versions of Ray and Python have to be those of the cluster."
        ) from error
    try:
        there = ray.cluster_resources()
        if there.get("CPU", 0) < 1:
            raise UserError(
                f"--ray {address}: no node of the cluster has a core for tasks; start some with "
                "`ray start --address=HEAD:6379`."
            )
        with printing:
            yield Cluster(int(there["CPU"]), int(there.get("GPU", 0)))
    finally:
        ray.shutdown()


def _refuse_unreachable(address: str) -> None:
    """Ray itself would try for minutes."""
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        found = canonicalize_bootstrap_address_or_die(address)
    except ConnectionError as error:
        raise UserError(
            "--ray auto finds no Ray cluster, or several, on this machine; start one with `ray "
            "start --head`, name one with --ray HOST:PORT, or take --ray local."
        ) from error
    host, _, port = found.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), REACHED_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.sendall(HTTP2 + SETTINGS)
            answer = connection.recv(len(SETTINGS))
            reason = "" if answer[3:4] == SETTINGS[3:4] else "what answers there is no Ray"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise UserError(
            f"--ray {address}: there is no Ray cluster at {found} ({reason}); start its head with "
            "`ray start --head --port=6379`."
        )
