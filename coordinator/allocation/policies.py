"""The policies: who supplies how many samples to the next step.

One object per policy and epoch, made by ``build_policy``. A policy is told what is left and what
each device can take, and draws one step; it holds no count of its own, so the planner's account is
the only one. A new policy is a class with the methods of ``StepPolicy``, or of ``ClassPolicy``
where it says which classes a device supplies, and a line in ``POLICIES``.

Shapes: K devices, M classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from coordinator.allocation.budget import Account, fit_within_budget
from coordinator.allocation.draws import draw_categorical, draw_hypergeometric
from coordinator.allocation.fleet import (
    ClassPolicy,
    Delays,
    Fleet,
    Policy,
    State,
    StepPolicy,
)
from coordinator.allocation.posterior import Fit, build_population, fit_posterior
from coordinator.allocation.targeted import ClassTargetedSampling
from coordinator.allocation.validation import FloatArray, IntArray

# A fit is made anew once devices with this share of its draws have run out: of hundreds of devices
# that is the first to run out, and of a hundred thousand, some of which do so in each step, a few
# hundred.
MOST_SHARE_GONE = 0.005


class _Stateless:
    """A policy that decides from what is left alone."""

    delta: float | None = None

    def replan(self, delays: Delays) -> None:
        """Nothing is derived from delays."""

    def state(self) -> State:
        """Nothing to keep."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to take."""


class FixedLocalBatches(_Stateless):
    """The baselines: every device the same counts each step until it runs out.

    A step is smaller once devices have run out. What a cap takes from a device goes to those with
    room, in proportion to their own local batch.
    """

    def __init__(self, local_batch_K: IntArray) -> None:
        self._local_batch_K = local_batch_K

    @classmethod
    def equal(cls, fleet: Fleet) -> FixedLocalBatches:
        """FLS: round(B / K), at least 1."""
        devices = fleet.held_K.size
        share_K = np.full(devices, fleet.global_batch / devices)
        return cls(_rounded(share_K))

    @classmethod
    def proportional(cls, fleet: Fleet) -> FixedLocalBatches:
        """FPLS: round(B n_k / sum n) of the samples held, at least 1."""
        held = max(int(fleet.held_K.sum()), 1)
        return cls(_rounded(fleet.global_batch * (fleet.held_K / held)))

    def draw(self, rng: np.random.Generator, remaining_K: IntArray, room_K: IntArray) -> IntArray:
        """The local batches, cut to what is left and to the caps; nothing here is random."""
        del rng
        wanted_K = np.minimum(self._local_batch_K, remaining_K)
        counts_K = np.minimum(wanted_K, room_K)
        excess = int((wanted_K - counts_K).sum())
        if excess:
            counts_K = counts_K + _spread(excess, room_K - counts_K, self._local_batch_K)
        return counts_K

    def expected_share(self, remaining_K: IntArray) -> FloatArray:
        """Of the local batches cut to what is left."""
        wanted_K = np.minimum(self._local_batch_K, remaining_K)
        return wanted_K / max(int(wanted_K.sum()), 1)


class UniformGlobalSampling(_Stateless):
    """UGS: B of all remaining samples, uniformly without replacement."""

    def __init__(self, fleet: Fleet) -> None:
        self._global_batch = fleet.global_batch

    def draw(self, rng: np.random.Generator, remaining_K: IntArray, room_K: IntArray) -> IntArray:
        """Multivariate hypergeometric counts."""
        return draw_hypergeometric(rng, remaining_K, room_K, self._global_batch)

    def expected_share(self, remaining_K: IntArray) -> FloatArray:
        """Of what is left."""
        return remaining_K / max(int(remaining_K.sum()), 1)


class LatentDirichletSampling:
    """LDS: B draws from the posterior, refitted on what is left.

    Refits come every ``refit_every`` steps, when devices that the fit counts on have run out, and
    after ``replan``. With one fit for the whole epoch the last steps hold whatever classes remain.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._delays_K = fleet.delays.typical_K
        self.delta: float | None = None
        self._fit: Fit | None = None
        self._edges_K = np.zeros(0)
        self._steps_since_fit = 0
        self._stale = True
        # The account of the deviation budget: steps drawn, their excess, and that of the fit.
        self._steps = 0
        self._spent = 0.0
        self._excess = 0.0

    def draw(self, rng: np.random.Generator, remaining_K: IntArray, room_K: IntArray) -> IntArray:
        """Categorical counts; a device that runs out within the step leaves the draw."""
        self._refit_where_due(remaining_K)
        self._steps_since_fit += 1
        self._steps += 1
        self._spent += self._excess
        return draw_categorical(rng, self._edges_K, room_K, self._fleet.global_batch)

    def expected_share(self, remaining_K: IntArray) -> FloatArray:
        """The posterior that the next step is drawn from."""
        if not remaining_K.any():
            return np.zeros(remaining_K.shape)
        return self._refit_where_due(remaining_K).pi_K

    def replan(self, delays: Delays) -> None:
        """Refit with these delays before the next step."""
        self._delays_K = delays.typical_K
        self._stale = True

    def state(self) -> State:
        """The last fit: it was made on an earlier remainder, so it cannot be made again."""
        state: State = {
            "delta": self.delta,
            "steps_since_fit": self._steps_since_fit,
            "stale": self._stale,
            "steps": self._steps,
            "spent": self._spent,
            "excess": self._excess,
            "pi": None,
            "class_mix": None,
            "duals": None,
        }
        if self._fit is not None:
            duals = [None if np.isnan(dual) else dual for dual in self._fit.duals_M.tolist()]
            state |= {
                "pi": self._fit.pi_K.tolist(),
                "class_mix": self._fit.mix_M.tolist(),
                "duals": duals,
            }
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with the fit of ``state``."""
        self.delta = state["delta"]
        self._steps_since_fit = int(state["steps_since_fit"])
        self._stale = bool(state["stale"])
        self._steps = int(state["steps"])
        self._spent = float(state["spent"])
        self._excess = float(state["excess"])
        self._fit = None
        if state["pi"] is not None:
            duals = [np.nan if dual is None else dual for dual in state["duals"]]
            self._use(
                Fit(
                    pi_K=np.array(state["pi"], dtype=np.float64),
                    mix_M=np.array(state["class_mix"], dtype=np.float64),
                    duals_M=np.array(duals, dtype=np.float64),
                    iterations=0,
                )
            )

    def _refit_where_due(self, remaining_K: IntArray) -> Fit:
        fit = self._fit
        due = self._stale or self._steps_since_fit >= self._fleet.refit_every
        if fit is None or due or fit.pi_K[remaining_K == 0].sum() > MOST_SHARE_GONE:
            fit = self._refit(remaining_K)
            self._use(fit)
            self._steps_since_fit, self._stale = 0, False
        return fit

    def _refit(self, remaining_K: IntArray) -> Fit:
        population = build_population(self._fleet.beta_MK, remaining_K, self._delays_K)
        start_M = None if self._fit is None else self._fit.duals_M
        if self._fleet.delta is not None:
            self.delta = self._fleet.delta
            return fit_posterior(population, delta=self.delta, start_M=start_M)
        account = Account(
            deviation_budget=self._fleet.deviation_budget,
            steps=self._steps + population.left / self._fleet.global_batch,
            spent=self._spent,
        )
        self.delta, fit, self._excess = fit_within_budget(
            population,
            account=account,
            global_batch=self._fleet.global_batch,
            guess=self.delta,
            start_M=start_M,
        )
        return fit

    def _use(self, fit: Fit) -> None:
        self._fit = fit
        self._edges_K = np.cumsum(fit.pi_K)


POLICIES: Mapping[Policy, Callable[[Fleet], StepPolicy | ClassPolicy]] = {
    Policy.FLS: FixedLocalBatches.equal,
    Policy.FPLS: FixedLocalBatches.proportional,
    Policy.UGS: UniformGlobalSampling,
    Policy.LDS: LatentDirichletSampling,
    Policy.CLASS_TARGETED: ClassTargetedSampling,
}


def build_policy(policy: Policy | str, fleet: Fleet) -> StepPolicy | ClassPolicy:
    """A fresh object of the named policy for one epoch."""
    return POLICIES[parse_policy(policy)](fleet)


def parse_policy(name: Policy | str) -> Policy:
    """The policy of that name; ValueError lists the known ones."""
    try:
        return Policy(name)
    except ValueError:
        known = ", ".join(Policy)
        raise ValueError(f"policy: expected one of {known}, received {name!r}") from None


def _rounded(share_K: FloatArray) -> IntArray:
    """Round half up, at least 1; a device without samples takes no part whatever its batch."""
    rounded_K: IntArray = np.maximum(np.floor(share_K + 0.5).astype(np.int64), 1)
    return rounded_K


def _spread(excess: int, room_K: IntArray, weight_K: IntArray) -> IntArray:
    """Hand ``excess`` to devices with room in proportion to weight; singles go in device order."""
    added_K = np.zeros_like(room_K)
    excess = min(excess, int(room_K.sum()))
    while excess:
        open_K = np.where(room_K > added_K, weight_K, 0)
        share_K = np.floor(excess * (open_K / open_K.sum())).astype(np.int64)
        if not share_K.any():
            share_K[np.flatnonzero(open_K)[:excess]] = 1
        given_K = np.minimum(share_K, room_K - added_K)
        added_K += given_K
        excess -= int(given_K.sum())
    return added_K
