"""From settings to a ready daemon."""

from __future__ import annotations

import logging

from edge_agent.compute import ComputeBackend, build_backend, choose_backward
from edge_agent.config import AgentSettings
from edge_agent.daemon import AgentDaemon
from edge_agent.datasets import load_data
from edge_agent.worker import Worker
from wire.messages import Capabilities, SampleOrder
from wire.signing import load_trusted_keys

logger = logging.getLogger(__name__)


def build_daemon(settings: AgentSettings, *, source: str) -> AgentDaemon:
    """Load data and backends; raises ConfigError naming file and field."""
    data = load_data(settings.data, source=source)
    backend = build_settings_backend(settings)
    worker = Worker(data, backend)
    trust = load_trusted_keys(settings.bundle_keys, source=source)
    if trust is None:
        logger.info("%s: no bundle_keys: unsigned bundles are accepted", settings.device)
    capabilities = build_capabilities(settings, backend)
    return AgentDaemon(settings, data, worker, capabilities, trust=trust)


def build_capabilities(settings: AgentSettings, backend: ComputeBackend) -> Capabilities:
    """What the birth says that this device can do."""
    forward = (backend.forward_name,)
    orders = tuple(order.value for order in SampleOrder)
    if backend.can_backward:
        return Capabilities(forward=forward, backward=(backend.backward_name,), orders=orders)
    why = choose_backward(settings.compute.backward).why
    return Capabilities(
        forward=forward,
        reason=f"{why}: it can take part with a frozen client segment",
        orders=orders,
    )


def build_settings_backend(settings: AgentSettings) -> ComputeBackend:
    """The backend that the settings name, without a bundle."""
    compute = settings.compute
    return build_backend(
        forward=compute.forward,
        backward=compute.backward,
        threads=compute.threads,
        max_batch_bytes=compute.max_batch_bytes,
    )
