"""What is written down of a campaign: its settings, where it is, and each of its devices.

Plain values, stored as JSON. Times are Unix times, so that they hold over a restart.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from wire.topics import NAME_RULE, is_valid_name


class CampaignPhase(StrEnum):
    """Where a campaign is. ``soaking``: a wave is through and is watched."""

    RUNNING = "running"
    SOAKING = "soaking"
    PAUSED = "paused"
    ABORTING = "aborting"  # waits for devices to say that they have stopped or gone back
    ROLLING_BACK = "rolling-back"
    COMPLETED = "completed"
    ABORTED = "aborted"
    ROLLED_BACK = "rolled-back"


OPEN_PHASES = frozenset({CampaignPhase.RUNNING, CampaignPhase.SOAKING, CampaignPhase.PAUSED})
CLOSING_PHASES = frozenset({CampaignPhase.ABORTING, CampaignPhase.ROLLING_BACK})
ENDED_PHASES = frozenset(CampaignPhase) - OPEN_PHASES - CLOSING_PHASES


class DevicePhase(StrEnum):
    """Where a device is with the campaign's bundle."""

    PLANNED = "planned"
    OFFERED = "offered"
    DOWNLOADING = "downloading"
    TESTING = "testing"
    TRIAL = "trial"  # in use, not yet committed
    CANCELLING = "cancelling"  # told to stop or to go back
    COMMITTED = "committed"
    REFUSED = "refused"
    FAILED = "failed"
    REVERTED = "reverted"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed-out"
    UNREACHABLE = "unreachable"


ACTIVE_PHASES = frozenset(
    {DevicePhase.OFFERED, DevicePhase.DOWNLOADING, DevicePhase.TESTING, DevicePhase.TRIAL}
)
FAILED_PHASES = frozenset(
    {DevicePhase.REFUSED, DevicePhase.FAILED, DevicePhase.REVERTED, DevicePhase.TIMED_OUT}
)
TERMINAL_PHASES = FAILED_PHASES | {
    DevicePhase.COMMITTED,
    DevicePhase.CANCELLED,
    DevicePhase.UNREACHABLE,
}
UPDATED_PHASES = frozenset({DevicePhase.TRIAL, DevicePhase.COMMITTED})
RETRIED_PHASES = FAILED_PHASES | {DevicePhase.CANCELLED, DevicePhase.UNREACHABLE}


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what is stored. Unknown fields are skipped, so that later versions can add some."""


class BundleFacts(Record, frozen=True, kw_only=True):
    """What a campaign needs to know of its bundle."""

    digest: str
    size_bytes: int
    name: str
    version: str
    input_shape: tuple[int, ...] = ()
    classes: int = 0
    frozen: bool = False
    signed_by: str = ""

    def __post_init__(self) -> None:
        if len(self.digest) != 64 or not set(self.digest) <= set("0123456789abcdef"):
            raise ValueError(f"expected digest: 64 hexadecimal digits, received {self.digest!r}")
        if self.size_bytes < 1:
            raise ValueError(f"expected size_bytes >= 1, received {self.size_bytes}")


class Limits(Record, frozen=True, kw_only=True):
    """How long a device may stay in each phase, in seconds. Every device ends somewhere.

    ``offered_s``: from the opening of its wave, for a device that is away, and from the offer for
    one that does not answer. ``commit_s`` begins with the trial and must outlast it.
    """

    offered_s: float = 3600.0
    download_s: float = 900.0
    self_test_s: float = 120.0
    commit_s: float = 3600.0

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            if not getattr(self, field) > 0:
                raise ValueError(f"expected limits.{field} > 0, received {getattr(self, field)}")


class Selection(Record, frozen=True, kw_only=True):
    """Which devices a campaign is for: all, or those that a pattern and every label fit.

    ``patterns`` are shell patterns of ids (any of them must fit); ``labels`` maps names to shell
    patterns of values (all must fit). ``devices`` adds ids by name, seen or not. ``first`` are
    the ids that come before all others.
    """

    patterns: tuple[str, ...] = ()
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    devices: tuple[str, ...] = ()
    first: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("devices", "first"):
            for name in getattr(self, field):
                if not is_valid_name(name):
                    raise ValueError(f"expected {field}: {NAME_RULE}; received {name!r}")


class CampaignSettings(Record, frozen=True, kw_only=True):
    """What an operator asks for.

    ``waves`` as in ``1,10%,50%,100%``; ``soak_s`` watches each wave before the next.
    ``rate_per_min`` limits offers (0: no limit). A wave may lose the share ``max_failed`` of its
    devices, the campaign ``max_lost`` of its updated ones to silence (offline for longer than
    ``lost_after_s``); above it aborts, and reverts what was committed if ``revert_on_abort``.
    ``good_steps`` and ``trial_s`` are what a device has to see before it commits. ``shared``:
    chunks that several devices ask for go out once for all.
    ``take_from_run``: devices that take part in a run of another bundle are updated too.
    """

    waves: str = "1,10%,50%,100%"
    selection: Selection = Selection()
    include_new: bool = False
    soak_s: float = 60.0
    rate_per_min: float = 0.0
    max_failed: float = 0.1
    max_lost: float = 0.2
    lost_after_s: float = 300.0
    revert_on_abort: bool = False
    good_steps: int = 0
    trial_s: float = 30.0
    limits: Limits = Limits()
    shared: bool = True
    take_from_run: bool = False

    def __post_init__(self) -> None:
        for field in ("max_failed", "max_lost"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"expected {field} from 0 to 1, received {getattr(self, field)}")
        for field in ("soak_s", "rate_per_min", "lost_after_s", "good_steps", "trial_s"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"expected {field} >= 0, received {getattr(self, field)}")
        if self.limits.commit_s <= self.trial_s:
            raise ValueError(
                f"expected limits.commit_s above trial_s ({self.trial_s:g}), "
                f"received {self.limits.commit_s:g}"
            )


class CampaignRecord(Record, frozen=True, kw_only=True):
    """Where a campaign is.

    ``waves`` is their number, those of ``retry`` behind the ``planned_waves``; ``wave`` is the open
    one, from 0. ``since_s`` is when the phase began.
    ``excused`` is the wave that an operator let pass although nobody committed in it.
    ``revert``: what was committed has to go back.
    """

    campaign: str
    fleet: str
    bundle: BundleFacts
    settings: CampaignSettings
    phase: CampaignPhase
    waves: int
    planned_waves: int
    wave: int = 0
    created_s: float
    since_s: float
    wave_since_s: float
    next_offer_s: float = 0.0
    excused: int = -1
    revert: bool = False
    reason: str = ""
    left_out: int = 0


class SelfTest(Record, frozen=True, kw_only=True):
    """What a device measured in its self-test."""

    seconds: float
    peak_bytes: int
    max_error: float | None = None
    gradient_error: float | None = None


class DeviceEntry(Record, frozen=True, kw_only=True):
    """A device of a campaign.

    ``furthest`` is the phase whose limit holds, since ``since_s``: a device that begins its
    download again gets no more time by it. ``told_s`` is when it was last told something, so that
    it is not told again too soon. ``is_cancelled``: it was told to stop, with ``revert`` to go
    back from the bundle too. ``sequence`` is that of its last report in this ``attempt``.
    """

    device: str
    wave: int
    rank: int
    phase: DevicePhase = DevicePhase.PLANNED
    furthest: DevicePhase = DevicePhase.PLANNED
    since_s: float = 0.0
    told_s: float = 0.0
    attempt: int = 0
    is_cancelled: bool = False
    revert: bool = False
    detail: str = ""
    sequence: int = 0
    self_test: SelfTest | None = None

    @property
    def is_terminal(self) -> bool:
        return self.phase in TERMINAL_PHASES

    @property
    def is_active(self) -> bool:
        return self.phase in ACTIVE_PHASES
