"""Connections that end soon after they began raise a suspicion; others do not."""

from __future__ import annotations

from wire.quick_losses import QUICK_S, SUSPICIOUS_LOSSES, QuickLosses


def lose(losses: QuickLosses, now_s: float, after_s: float) -> bool:
    losses.accepted(now_s)
    return losses.lost(now_s + after_s)


def test_only_a_row_of_quick_losses_is_suspicious() -> None:
    losses = QuickLosses()
    verdicts = [lose(losses, 10.0 * turn, 1.0) for turn in range(SUSPICIOUS_LOSSES + 1)]
    assert verdicts == [False] * (SUSPICIOUS_LOSSES - 1) + [True, True]


def test_connection_that_lasted_ends_the_row() -> None:
    losses = QuickLosses()
    for turn in range(SUSPICIOUS_LOSSES):
        lose(losses, 10.0 * turn, 1.0)
    assert not lose(losses, 100.0, QUICK_S)
    assert not lose(losses, 200.0, 1.0)


def test_one_loss_that_is_told_twice_counts_once() -> None:
    losses = QuickLosses()
    for turn in range(SUSPICIOUS_LOSSES - 1):
        lose(losses, 10.0 * turn, 1.0)
        assert not losses.lost(10.0 * turn + 1.1)
    assert lose(losses, 100.0, 1.0)
