"""How many samples each device contributes to each step. No torch, no broker, no clock."""

from coordinator.allocation.budget import expected_deviation
from coordinator.allocation.deviation import batch_deviation
from coordinator.allocation.fleet import ClassPolicy, Policy, StepPolicy
from coordinator.allocation.planner import EpochPlanner, plan_epoch
from coordinator.allocation.policies import POLICIES
from coordinator.allocation.posterior import lds_posterior

__all__ = [
    "POLICIES",
    "ClassPolicy",
    "EpochPlanner",
    "Policy",
    "StepPolicy",
    "batch_deviation",
    "expected_deviation",
    "lds_posterior",
    "plan_epoch",
]
