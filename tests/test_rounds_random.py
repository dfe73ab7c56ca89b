"""The round state machine under random events, with invariants checked after each of them."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator.actions import Phase
from coordinator.allocation import Policy
from coordinator.patience import DeadlineSettings
from coordinator.planning import PlannedSlot, PolicySettings
from coordinator.rounds import RoundSettings
from tests.round_owner import Owner, fingerprint, range_header
from wire.errors import PeerProtocolError

DEVICES = ("a", "b", "c", "d")
EPOCHS = 2


class FleetMachine(RuleBasedStateMachine):
    """Devices answer in any order, twice, late or never; they leave, return and change."""

    frozen = False

    @initialize(
        samples=st.tuples(*[st.integers(1, 14)] * len(DEVICES)),
        global_batch=st.integers(1, 12),
        min_devices=st.integers(1, 2),
        policy=st.sampled_from([Policy.UGS, Policy.LDS, Policy.FPLS, Policy.CLASS_TARGETED]),
        fixed_s=st.sampled_from([None, 8.0]),
    )
    def begin(
        self,
        samples: tuple[int, ...],
        global_batch: int,
        min_devices: int,
        policy: Policy,
        fixed_s: float | None,
    ) -> None:
        self.samples = dict(zip(DEVICES, samples, strict=True))
        self.online: set[str] = set()
        self.owner = Owner(
            RoundSettings(
                global_batch=global_batch,
                epochs=EPOCHS,
                policy=PolicySettings(name=policy, refit_every=3),
                deadline=DeadlineSettings(
                    fixed_s=fixed_s, first_s=20.0, min_s=1.0, max_misses=2, return_grace_s=5.0
                ),
                min_devices=min_devices,
                frozen=self.frozen,
                ahead=2,
                seed=1,
            )
        )
        self.history: list[tuple[str, int, int, PlannedSlot, int]] = []

    # Devices come and go

    @rule(device=st.sampled_from(DEVICES))
    def device_comes_or_restarts(self, device: str) -> None:
        self._come(device)

    @rule(device=st.sampled_from(DEVICES), samples=st.integers(1, 14))
    def device_comes_with_other_data(self, device: str, samples: int) -> None:
        self.samples[device] = samples
        self._come(device)

    def _come(self, device: str) -> None:
        self.online.add(device)
        self.owner.ready(device, self.samples[device])

    @rule(device=st.sampled_from(DEVICES))
    def device_goes(self, device: str) -> None:
        self.online.discard(device)
        self.owner.gone(device)

    # Messages

    def _remember(self, slot: PlannedSlot) -> None:
        rounds = self.owner.rounds
        kind = "gradients" if rounds.phase is Phase.BACKWARD else "activations"
        self.history.append((kind, rounds.epoch, self.owner.step, slot, rounds.version))

    @precondition(lambda self: self.owner.owed())
    @rule(data=st.data())
    def device_answers(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.owner.owed()))
        self._remember(slot)
        self.owner.answer([slot])

    @precondition(lambda self: self.owner.owed())
    @rule(seconds=st.floats(0.0, 3.0))
    def all_answer_after_a_while(self, seconds: float) -> None:
        self.owner.now_s += seconds
        phase, step = self.owner.rounds.phase, self.owner.step
        for slot in self.owner.owed():
            if (self.owner.rounds.phase, self.owner.step) == (phase, step):
                self._remember(slot)
                self.owner.answer([slot])

    @precondition(lambda self: self.history)
    @rule(data=st.data())
    def old_message_comes_again_and_is_refused(self, data: st.DataObject) -> None:
        """Whatever a device has sent once is used at most once."""
        kind, epoch, step, slot, version = data.draw(st.sampled_from(self.history))
        send = self.owner.send_activations if kind == "activations" else self.owner.send_gradients
        before = fingerprint(self.owner.rounds)
        with pytest.raises(PeerProtocolError):
            send(step, slot, version=version, epoch=epoch)
        assert fingerprint(self.owner.rounds) == before

    @precondition(lambda self: self.history)
    @rule(data=st.data())
    def late_answer_is_learned_from(self, data: st.DataObject) -> None:
        _, epoch, step, slot, _ = data.draw(st.sampled_from(self.history))
        rounds = self.owner.rounds
        version = rounds.version
        header = range_header(slot, step, epoch)
        self.owner.perform(rounds.observe_late(slot.device, header, self.owner.now_s))
        assert rounds.version == version

    @rule(device=st.sampled_from(DEVICES))
    def device_begins_to_send_useless_activations(self, device: str) -> None:
        self.owner.poisoned.add(device)

    @rule()
    def all_devices_are_well_again(self) -> None:
        self.owner.poisoned.clear()

    # Time and crashes

    @rule(seconds=st.sampled_from([0.1, 2.0, 6.0, 25.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.owner.pass_time(seconds)

    @rule(online=st.sets(st.sampled_from(DEVICES), min_size=1))
    def coordinator_restarts_from_a_checkpoint(self, online: set[str]) -> None:
        owner = self.owner
        if owner.rounds.phase is Phase.DONE:
            return
        owner.restart()
        self.history.clear()  # a resumed run has another name: all that was sent is foreign
        self.online.clear()
        for device in sorted(online):
            self._come(device)

    @invariant()
    def accounts_are_right_and_something_can_happen(self) -> None:
        self.owner.check()

    def teardown(self) -> None:
        """However it came here: once all devices answer, the run ends."""
        if not hasattr(self, "owner"):
            return
        owner = self.owner
        owner.poisoned.clear()
        if owner.rounds.phase is not Phase.DONE:
            for device in sorted(self.samples.keys() - self.online):
                self._come(device)
            owner.run_until(Phase.DONE)
        owner.check()
        assert [end.epoch for end in owner.epochs] == list(range(EPOCHS))
        assert sum(owner.rounds.trained.values()) == sum(end.trained for end in owner.epochs)
        missed = [end.missed for end in owner.epochs]
        assert sum(owner.rounds.missed.values()) == sum(sum(m.values()) for m in missed)


class FrozenFleetMachine(FleetMachine):
    """The same with a frozen client segment: devices run ahead, there is no backward pass."""

    frozen = True

    def _ahead(self) -> list[tuple[int, PlannedSlot]]:
        rounds = self.owner.rounds
        planned = [pair for name in sorted(rounds.members) for pair in rounds.slots_of(name)]
        return [
            (step, slot)
            for step, slot in planned
            if rounds.step < step <= rounds.step + 2 and (step, slot) not in self.owner.early
        ]

    @precondition(lambda self: self.owner.rounds.phase is Phase.FORWARD and self._ahead())
    @rule(data=st.data())
    def device_runs_ahead(self, data: st.DataObject) -> None:
        step, slot = data.draw(st.sampled_from(self._ahead()))
        rounds = self.owner.rounds
        self.history.append(("activations", rounds.epoch, step, slot, 0))
        self.owner.send_activations(step, slot, version=0)


for machine in (FleetMachine, FrozenFleetMachine):
    machine.TestCase.settings = settings(
        max_examples=60,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
TestFleet = FleetMachine.TestCase
TestFrozenFleet = FrozenFleetMachine.TestCase
