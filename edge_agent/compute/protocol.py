"""What an agent asks of whatever computes its client segment.

Legend: B samples in the batch, X one sample's shape, A one activation's shape.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from wire.bundle import Bundle, Manifest


class ComputeBackend(Protocol):
    """Runs a client segment forward and backward, in micro-batches that fit the memory limit."""

    @property
    def forward_name(self) -> str:
        """``onnxruntime`` or ``torch``."""

    @property
    def backward_name(self) -> str:
        """``torch``, ``onnxruntime``, or ``none`` on a device for frozen segments only."""

    @property
    def can_backward(self) -> bool:
        """Whether this device can train a client segment; known before a bundle is loaded."""

    @property
    def forward_pass_samples(self) -> int | None:
        """Samples that go through the loaded bundle's forward pass at once; None: any number."""

    @property
    def backward_pass_samples(self) -> int | None:
        """Samples that go through its backward pass at once; None: any number."""

    def prepare(self, manifest: Manifest) -> None:
        """Import the libraries that ``load`` needs for such a bundle; ConfigError if one lacks."""

    def load(self, bundle: Bundle) -> None:
        """Get ready to run ``bundle`` with its initial weights; replaces an earlier one.

        Raises ModelError for a bundle that cannot be run here, ConfigError for a missing library.
        """

    def set_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Use these parameters (all of them; buffers may be left out) from now on.

        The arrays become the backend's: the caller does not write to them any more.
        Raises ModelError naming the tensor that is missing, unknown or of another shape.
        """

    def forward(self, x_BX: NDArray[Any], *, token: Hashable | None = None) -> NDArray[Any]:
        """Activations (B, *A) of samples (B, *X), float32.

        ``token`` names this batch. If ``backward`` is asked for the same token next, a backend
        that can may have kept what it needs; otherwise it computes the forward pass again.
        """

    def backward(
        self, x_BX: NDArray[Any], grad_BA: NDArray[Any], *, token: Hashable | None = None
    ) -> dict[str, NDArray[Any]]:
        """Each parameter's gradient, summed over the batch, for ``grad_BA`` at the cut."""
