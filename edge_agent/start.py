"""From settings to a ready daemon, and the checks of ``edge-agent check``."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from edge_agent.compute import ComputeBackend, build_backend, choose_backward
from edge_agent.config import AgentSettings
from edge_agent.daemon import AgentDaemon
from edge_agent.datasets import load_data
from edge_agent.worker import Worker
from wire.errors import TransportError
from wire.inbox import Inbox
from wire.messages import Capabilities
from wire.mqtt import MqttConnection, wait_for_connection
from wire.topics import build_client_id

CHECK_TIMEOUT_S = 5.0


def build_daemon(settings: AgentSettings, *, source: str) -> AgentDaemon:
    """Load data and backends; raises ConfigError naming file and field."""
    data = load_data(settings.data, source=source)
    backend = _build_backend(settings)
    worker = Worker(data, backend)
    return AgentDaemon(settings, data, worker, build_capabilities(settings, backend))


def build_capabilities(settings: AgentSettings, backend: ComputeBackend) -> Capabilities:
    """What the birth says that this device can do."""
    forward = (backend.forward_name,)
    if backend.can_backward:
        return Capabilities(forward=forward, backward=(backend.backward_name,))
    why = choose_backward(settings.compute.backward).why
    return Capabilities(
        forward=forward, reason=f"{why}: it can take part with a frozen client segment"
    )


def check_device(settings: AgentSettings, *, source: str) -> dict[str, Any]:
    """Facts about this device and whether its broker answers."""
    data = load_data(settings.data, source=source)
    backend = _build_backend(settings)
    capabilities = build_capabilities(settings, backend)
    failure = _try_broker(settings)
    return {
        "device": settings.device,
        "fleet": settings.fleet,
        "samples": len(data),
        "sample_shape": list(data.sample_shape),
        "label_counts": data.label_counts.tolist(),
        "forward": backend.forward_name,
        "backward": capabilities.backward[0] if capabilities.backward else "none",
        "backward_reason": capabilities.reason,
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "max_batch_bytes": settings.compute.max_batch_bytes,
        "broker": f"{settings.mqtt.host}:{settings.mqtt.port}",
        "broker_reachable": failure is None,
        "broker_failure": failure or "",
    }


def _build_backend(settings: AgentSettings) -> ComputeBackend:
    compute = settings.compute
    return build_backend(
        forward=compute.forward,
        backward=compute.backward,
        threads=compute.threads,
        max_batch_bytes=compute.max_batch_bytes,
    )


def _try_broker(settings: AgentSettings) -> str | None:
    """Connect under another client id, so that a running agent keeps its connection."""
    inbox = Inbox()
    connection = MqttConnection(
        settings.mqtt,
        client_id=build_client_id(settings.fleet, settings.device, purpose="check"),
        fleet=settings.fleet,
        subscriptions=[],
        inbox=inbox,
        next_boot=lambda: 0,
        build_will=None,
    )
    connection.start()
    try:
        wait_for_connection(inbox, CHECK_TIMEOUT_S)
    except TransportError as exc:
        return str(exc)
    finally:
        connection.stop()
    return None
