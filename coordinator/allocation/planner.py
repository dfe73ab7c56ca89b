"""The epoch's plan, one step at a time: the account of what is left, and a policy that draws.

No clock, file or thread: the same arguments give the same steps, and a planner restored from
``state()`` goes on bit for bit. Memory is O(K M); steps are streamed, never held.

Shapes: K devices, M classes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from coordinator.allocation import validation
from coordinator.allocation.budget import DEFAULT_DEVIATION_BUDGET
from coordinator.allocation.fleet import ClassPolicy, Delays, Fleet, Policy, StepPolicy
from coordinator.allocation.policies import build_policy, parse_policy
from coordinator.allocation.posterior import build_label_mix
from coordinator.allocation.supply import Speeds
from coordinator.allocation.validation import FloatArray, IntArray

DEFAULT_REFIT_EVERY = 10
STATE_VERSION = 1


class EpochPlanner:
    """Plans one epoch: each sample left is allocated exactly once.

    label_counts: samples held per device and class, (K, M). global_batch: B. policy: name.
    delays_s: seconds of each device's step, (K,); None means equal. per_sample_s: seconds that each
    sample adds, (K,); where it is given, delays_s is the fixed part alone. Class-targeted sampling
    uses both parts, LDS the time of a typical contribution. delta: for LDS, or None to choose it
    from ``deviation_budget`` (default 0.10) at every refit; policies without delta ignore both.
    max_batch: largest count per device and step, one for all or (K,). refit_every: steps between
    refits. seed: of all draws. remaining: samples left, (K,), for an epoch under way, or per class,
    (K, M), which class-targeted sampling needs; by default all that are held. Raises ValueError
    that names the argument.

    A step has B samples, the last one the rest; a step is smaller where the caps of the devices
    with samples left admit no more, and with FLS and FPLS once devices have run out.
    """

    def __init__(
        self,
        label_counts: ArrayLike,
        global_batch: int,
        *,
        policy: Policy | str,
        delays_s: ArrayLike | None = None,
        per_sample_s: ArrayLike | None = None,
        delta: float | None = None,
        deviation_budget: float | None = None,
        max_batch: ArrayLike | None = None,
        refit_every: int = DEFAULT_REFIT_EVERY,
        seed: int = 0,
        remaining: ArrayLike | None = None,
    ) -> None:
        counts_KM = validation.check_label_counts(label_counts)
        self._held_K: IntArray = counts_KM.sum(axis=1)
        self._beta_MK = build_label_mix(counts_KM)
        # Tells a checkpoint of this fleet from one of another fleet of the same size.
        self._fingerprint = zlib.crc32(counts_KM.tobytes())
        devices = self._held_K.size
        self._policy_name = parse_policy(policy)
        self._global_batch = validation.check_whole_number(global_batch, "global_batch", least=1)
        self._max_batch_K = validation.check_max_batch(max_batch, devices)
        self._refit_every = validation.check_whole_number(refit_every, "refit_every", least=1)
        self._delta, self._deviation_budget = _checked_choice(delta, deviation_budget)
        self._delays = self._checked_delays(
            np.zeros(devices) if delays_s is None else delays_s, per_sample_s
        )
        # By class where the policy counts by class; then what is held, and what is left of it.
        self._held_MK: IntArray | None = (
            np.ascontiguousarray(counts_KM.T) if self._policy_name.is_by_class else None
        )
        self._remaining_MK = self._held_MK
        self._remaining_K = self._held_K
        if remaining is not None:
            self._take_remaining(remaining)
        self._class_counts_KM: IntArray | None = None
        self._steps = 0
        seed = validation.check_whole_number(seed, "seed", least=0)
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._policy: StepPolicy | ClassPolicy = build_policy(self._policy_name, self._fleet())

    @classmethod
    def from_state(cls, label_counts: ArrayLike, state: Mapping[str, Any]) -> EpochPlanner:
        """A planner that continues where ``state`` was taken, with the settings kept in it."""
        settings = _section(state, "settings")
        planner = cls(label_counts, **settings)
        planner.restore(state)
        return planner

    @property
    def policy(self) -> Policy:
        """The policy's name."""
        return self._policy_name

    @property
    def remaining(self) -> IntArray:
        """Samples not yet allocated, (K,); a copy."""
        left_K: IntArray = self._remaining_K.copy()
        return left_K

    @property
    def steps_planned(self) -> int:
        """Steps drawn so far, before a restore too."""
        return self._steps

    @property
    def last_delta(self) -> float | None:
        """Delta of the step drawn last; None before it and for policies without one."""
        return self._policy.delta

    @property
    def step_class_mix_expected(self) -> FloatArray:
        """Class mix that the next step is expected to have, (M,), caps left aside.

        Sums to 1; zeros where nothing is left. pi beta for LDS, the mix of what is left for UGS and
        class-targeted sampling.
        """
        if self._remaining_MK is not None:
            left_M = self._remaining_MK.sum(axis=1)
            left_mix_M: FloatArray = left_M / max(int(left_M.sum()), 1)
            return left_mix_M
        assert isinstance(self._policy, StepPolicy)
        mix_M: FloatArray = self._beta_MK @ self._policy.expected_share(self._remaining_K)
        return mix_M

    @property
    def class_counts(self) -> IntArray | None:
        """Samples per device and class, (K, M), of the step allocated last.

        None before it, and for policies that leave classes to the devices' permutations.
        """
        return self._class_counts_KM

    def next_step(self) -> IntArray | None:
        """Allocate one step: samples per device, (K,) int64, not all 0; None at the end."""
        if not self._remaining_K.any():
            return None
        room_K = self._remaining_K
        if self._max_batch_K is not None:
            room_K = np.minimum(room_K, self._max_batch_K)
        counts_K = self._draw(room_K)
        self._remaining_K = self._remaining_K - counts_K
        self._steps += 1
        return counts_K

    def _draw(self, room_K: IntArray) -> IntArray:
        if self._remaining_MK is None:
            assert isinstance(self._policy, StepPolicy)
            return self._policy.draw(self._rng, self._remaining_K, room_K)
        assert isinstance(self._policy, ClassPolicy)
        counts_MK = self._policy.draw_by_class(self._rng, self._remaining_MK, room_K)
        self._remaining_MK = self._remaining_MK - counts_MK
        self._class_counts_KM = counts_MK.T
        counts_K: IntArray = counts_MK.sum(axis=0)
        return counts_K

    def set_delays(self, delays_s: ArrayLike, per_sample_s: ArrayLike | None = None) -> None:
        """Use these delays, (K,) each, from the next step on; policies refit where they differ.

        The arguments mean what they mean to the constructor.
        """
        received = self._checked_delays(delays_s, per_sample_s)
        if received == self._delays:
            return
        self._delays = received
        self._policy.replan(received)

    def set_remaining(self, remaining: ArrayLike) -> None:
        """Correct the account, (K,), or (K, M) for class-targeted sampling.

        Ranges came back to the pool, or a device left or returned.
        """
        self._take_remaining(remaining)
        self._policy.replan(self._delays)

    def _take_remaining(self, remaining: ArrayLike) -> None:
        if self._held_MK is None:
            self._remaining_K = validation.check_remaining(
                remaining, self._held_K, at_most_held=True
            )
            return
        left_KM = validation.check_remaining_by_class(remaining, self._held_MK.T)
        self._remaining_MK = np.ascontiguousarray(left_KM.T)
        self._remaining_K = left_KM.sum(axis=1)

    def _checked_delays(self, delays_s: ArrayLike, per_sample_s: ArrayLike | None) -> Delays:
        devices = self._held_K.size
        fixed_K = validation.check_delays(delays_s, devices)
        if per_sample_s is None:
            return Delays(Speeds(fixed_K=fixed_K, per_sample_K=np.zeros(devices)), fixed_K)
        per_sample_K = validation.check_delays(per_sample_s, devices, "per_sample_s")
        share_K = self._held_K / max(1, int(self._held_K.sum()))
        typical_K = np.maximum(1.0, np.rint(self._global_batch * share_K))
        speeds = Speeds(fixed_K=fixed_K, per_sample_K=per_sample_K)
        return Delays(speeds, fixed_K + per_sample_K * typical_K)

    def state(self) -> dict[str, Any]:
        """All that continuing needs except the label counts, as JSON values."""
        caps_K, speeds = self._max_batch_K, self._delays.speeds
        return {
            "version": STATE_VERSION,
            "fingerprint": self._fingerprint,
            "settings": {
                "global_batch": self._global_batch,
                "policy": str(self._policy_name),
                "delta": self._delta,
                "deviation_budget": self._deviation_budget,
                "max_batch": None if caps_K is None else caps_K.tolist(),
                "refit_every": self._refit_every,
            },
            "steps": self._steps,
            "remaining": (
                self._remaining_K if self._remaining_MK is None else self._remaining_MK.T
            ).tolist(),
            "delays_s": speeds.fixed_K.tolist(),
            "per_sample_s": speeds.per_sample_K.tolist() if speeds.per_sample_K.any() else None,
            "random": _random_state(self._rng),
            "policy": self._policy.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken; ValueError where it is not of these label counts.

        Settings stay those of this planner.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"state: expected version {STATE_VERSION}, received {state.get('version')!r}"
            )
        settings = _section(state, "settings")
        _expect_equal("label counts' fingerprint", self._fingerprint, state.get("fingerprint"))
        _expect_equal("policy", str(self._policy_name), settings.get("policy"))
        self._take_remaining(state["remaining"])
        self._delays = self._checked_delays(state["delays_s"], state.get("per_sample_s"))
        self._steps = validation.check_whole_number(state["steps"], "state.steps", least=0)
        self._rng = _random_from(_section(state, "random"))
        self._policy = build_policy(self._policy_name, self._fleet())
        self._policy.restore(_section(state, "policy"))

    def _fleet(self) -> Fleet:
        return Fleet(
            beta_MK=self._beta_MK,
            held_K=self._held_K,
            delays=self._delays,
            global_batch=self._global_batch,
            delta=self._delta,
            deviation_budget=(
                DEFAULT_DEVIATION_BUDGET
                if self._deviation_budget is None
                else self._deviation_budget
            ),
            refit_every=self._refit_every,
        )


def plan_epoch(
    label_counts: ArrayLike,
    global_batch: int,
    *,
    policy: Policy | str,
    delays_s: ArrayLike | None = None,
    per_sample_s: ArrayLike | None = None,
    delta: float | None = None,
    deviation_budget: float | None = None,
    max_batch: ArrayLike | None = None,
    refit_every: int = DEFAULT_REFIT_EVERY,
    seed: int = 0,
) -> Iterator[IntArray]:
    """Iterate over an epoch's steps: samples per device, (K,) int64.

    The arguments are ``EpochPlanner``'s; wrong ones raise ValueError here, not at the first step.
    """
    planner = EpochPlanner(
        label_counts,
        global_batch,
        policy=policy,
        delays_s=delays_s,
        per_sample_s=per_sample_s,
        delta=delta,
        deviation_budget=deviation_budget,
        max_batch=max_batch,
        refit_every=refit_every,
        seed=seed,
    )
    return _steps_of(planner)


def _steps_of(planner: EpochPlanner) -> Iterator[IntArray]:
    while (counts_K := planner.next_step()) is not None:
        yield counts_K


def _checked_choice(
    delta: float | None, deviation_budget: float | None
) -> tuple[float | None, float | None]:
    if delta is not None and deviation_budget is not None:
        raise ValueError(
            "delta, deviation_budget: expected at most one of them, "
            f"received delta={delta!r} and deviation_budget={deviation_budget!r}"
        )
    if delta is not None:
        delta = validation.check_not_negative(delta, "delta")
    if deviation_budget is not None:
        deviation_budget = validation.check_not_negative(deviation_budget, "deviation_budget")
    return delta, deviation_budget


def _random_state(rng: np.random.Generator) -> dict[str, Any]:
    """PCG64's state; its 128-bit numbers as text, since many JSON readers stop at 64 bits."""
    state: Any = rng.bit_generator.state
    return {
        "state": str(state["state"]["state"]),
        "inc": str(state["state"]["inc"]),
        "has_uint32": int(state["has_uint32"]),
        "uinteger": int(state["uinteger"]),
    }


def _random_from(state: Mapping[str, Any]) -> np.random.Generator:
    bits = np.random.PCG64(0)
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": int(state["state"]), "inc": int(state["inc"])},
        "has_uint32": state["has_uint32"],
        "uinteger": state["uinteger"],
    }
    return np.random.Generator(bits)


def _section(state: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = state.get(name)
    if not isinstance(section, Mapping):
        raise ValueError(f"state: expected a section {name!r}, received {section!r}")
    return section


def _expect_equal(what: str, expected: object, received: object) -> None:
    if expected != received:
        raise ValueError(f"state: expected {what} {expected!r}, received {received!r}")
