"""The summary of a run: its tables, and numbers with units."""

from __future__ import annotations

import io

import pytest

from coordinator.recorder import RunSummary
from coordinator.tables import (
    build_console,
    describe_accounting,
    describe_refused,
    device_table,
    format_bytes,
    format_seconds,
    format_share,
    print_summary,
    printable,
    select_rows,
)
from tests.run_reports import device, epoch, summary


def summary_text(shown: RunSummary) -> str:
    stream = io.StringIO()
    print_summary(build_console(stream), shown)
    return stream.getvalue()


def test_the_summary_shows_devices_and_the_whole() -> None:
    refused = device("gw-8", refused={"duplicate": 1, "late": 3}, delay_s=None)
    text = summary_text(summary(devices=(device("gw-0"), refused), refused=refused.refused))
    for part in ("gw-0", "168", "504", "31.0 ms", "1.50 MB", "250 kB", "late 3, duplicate 1"):
        assert part in text
    for part in ("97.1 % (loss 0.1200)", "12.3 s, 5.12 steps/s", "12.0 MB up", "0.410"):
        assert part in text
    for part in ("lds, global batch 64, fp16", "mlp, cut at hidden", "127.0.0.1:1883"):
        assert part in text


def test_the_summary_fits_a_hundred_columns() -> None:
    long = device("d" * 64, refused={"not-allocated": 10_000, "non-finite": 2, "late": 1})
    assert max(map(len, summary_text(summary(devices=(long,))).splitlines())) <= 100


def test_exact_accounting_is_said_to_be_exact() -> None:
    text = describe_accounting(summary())
    assert text == "4,032 trained = 1,344 held x 3 epochs: every sample once per epoch"


def test_missed_samples_are_counted_and_named() -> None:
    devices = (
        device("gw-0"),
        device("gw-1", samples_missed=10),
        device("gw-2", samples_missed=20),
    )
    text = describe_accounting(summary(devices=devices, samples_trained=4002, samples_missed=30))
    assert "4,002 trained of 1,344 held x 3 epochs" in text
    assert text.endswith("30 missed: gw-2 (20), gw-1 (10)")


def test_devices_that_join_later_make_epochs_of_different_size() -> None:
    epochs = (epoch(0, samples=1000, trained=1000), epoch(1))
    text = describe_accounting(summary(epochs=2, epoch_results=epochs, samples_trained=2344))
    assert text == "2,344 trained = 2,344 held over 2 epochs: every sample once per epoch"


def test_a_stopped_run_does_not_claim_to_be_exact() -> None:
    text = describe_accounting(
        summary(completed=False, epochs=1, epoch_results=(epoch(0),), samples_trained=1500)
    )
    assert text == "1,500 trained in 1 whole epoch and what was done of the next"


def test_accounts_that_differ_are_not_hidden() -> None:
    assert "the accounts differ" in describe_accounting(summary(samples_trained=4031))


def test_of_many_devices_the_first_and_the_unusual_are_shown() -> None:
    devices = [device(f"gw-{number:03d}") for number in range(100)]
    devices[50] = device("gw-050", delay_s=0.4)
    devices[70] = device("gw-070", refused={"shape": 1})
    devices[80] = device("gw-080", samples_missed=5)
    text = summary_text(summary(devices=tuple(devices)))
    for name in ("gw-000", "gw-019", "gw-050", "gw-070", "gw-080"):
        assert name in text
    assert "gw-020" not in text
    assert "77 more devices (nothing unusual about them)" in text


def test_unusual_devices_that_are_left_out_are_counted() -> None:
    shown, left_out, outliers = select_rows(range(100), lambda row: row >= 40)
    assert (len(shown), left_out, outliers) == (40, 60, 40)


def test_a_table_never_leaves_out_a_single_row() -> None:
    assert device_table([device(f"gw-{n}") for n in range(21)]).row_count == 21
    assert device_table([device(f"gw-{n}") for n in range(22)]).row_count == 20


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (12_345_678, "12.3 MB"),
        (10**18, "1,000 PB"),
    ],
)
def test_bytes_have_three_digits_and_a_unit(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.0, "0 s"),
        (0.00018, "180 us"),
        (0.0312, "31.2 ms"),
        (0.9999, "1.00 s"),
        (4.213, "4.21 s"),
        (99.96, "1 min 40 s"),
        (192, "3 min 12 s"),
        (3599.6, "1 h 00 min"),
        (90_000, "1 d 01 h"),
    ],
)
def test_times_have_fitting_units(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_share_below_one_is_never_shown_as_all() -> None:
    assert [format_share(share) for share in (1.0, 0.99999, 0.9712, 0.0)] == [
        "100.0 %",
        "99.9 %",
        "97.1 %",
        "0.0 %",
    ]


def test_refusals_are_listed_by_frequency() -> None:
    assert describe_refused({"late": 1, "shape": 20, "dtype": 1}) == "shape 20, dtype 1, late 1"
    assert describe_refused({}) == "-"


def test_text_from_devices_cannot_command_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07b\nc\u202e\x9b") == "a ]0;title b c"
