"""The step protocol of the coordinator as a state machine. No sockets, clock, files or tensors."""

from coordinator.rounds.machine import Rounds
from coordinator.rounds.settings import RoundSettings

__all__ = ["RoundSettings", "Rounds"]
