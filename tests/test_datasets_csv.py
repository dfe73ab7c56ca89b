"""Sensor readings in CSV: windows of channels x time, and faults named by line."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.datasets import CsvSource, DataSettings, LabelledData, load_data
from wire.errors import ConfigError
from wire.settings import parse_settings


def _write(tmp_path: Path, labels: list[str], groups: list[str] | None = None) -> Path:
    """Write rows whose `ax` is the row number and whose `ay` is its negative."""
    lines = ["t,ax,ay,activity,person"]
    for row, label in enumerate(labels):
        lines.append(f"{row / 10},{row},-{row},{label},{groups[row] if groups else 'p'}")
    path = tmp_path / "walk.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def _source(path: Path, **changes: Any) -> CsvSource:
    fields = {"columns": ("ax", "ay"), "label": "activity", "window": 3, **changes}
    return CsvSource(path=str(path), **fields)


def _load(source: CsvSource, **more: Any) -> LabelledData:
    return load_data(DataSettings(csv=source, **more), source="agent.yaml")


def _refusal(source: CsvSource, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(source, **more)
    text = str(caught.value)
    assert text.startswith("agent.yaml: $.data")
    assert "\n" not in text
    return text


def test_windows_are_channels_by_time(tmp_path: Path) -> None:
    data = _load(_source(_write(tmp_path, ["0"] * 7)))
    assert data.x.dtype == np.float32
    assert data.x.flags.c_contiguous
    assert data.x.tolist() == [
        [[0, 1, 2], [0, -1, -2]],
        [[3, 4, 5], [-3, -4, -5]],
    ]
    assert data.y.tolist() == [0, 0]


def test_columns_come_in_the_order_asked_for(tmp_path: Path) -> None:
    data = _load(_source(_write(tmp_path, ["0"] * 3), columns=("ay", "t")))
    assert np.allclose(data.x, [[[0, -1, -2], [0, 0.1, 0.2]]])


def test_stride_makes_windows_overlap_or_leave_gaps(tmp_path: Path) -> None:
    path = _write(tmp_path, ["0"] * 9)
    assert _load(_source(path, stride=1)).x[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert _load(_source(path, stride=5)).x[:, 0, 0].tolist() == [0, 5]


def test_windows_with_mixed_labels_are_skipped(tmp_path: Path) -> None:
    data = _load(_source(_write(tmp_path, list("000110111"))))
    assert data.x[:, 0, 0].tolist() == [0, 6]
    assert data.y.tolist() == [0, 1]


def test_majority_gives_a_mixed_window_its_most_frequent_label(tmp_path: Path) -> None:
    data = _load(_source(_write(tmp_path, list("000110121")), mixed="majority"))
    assert data.y.tolist() == [0, 1, 1]
    tied = _load(_source(_write(tmp_path, list("2110")), window=4, mixed="majority"))
    assert tied.y.tolist() == [1]
    tied = _load(_source(_write(tmp_path, list("2211")), window=4, mixed="majority"))
    assert tied.y.tolist() == [1]


def test_windows_never_span_two_recordings(tmp_path: Path) -> None:
    path = _write(tmp_path, ["0"] * 10, groups=list("aaaabbbbbb"))
    assert _load(_source(path, group="person")).x[:, 0, 0].tolist() == [0, 4, 7]
    assert _load(_source(path)).x[:, 0, 0].tolist() == [0, 3, 6]


def test_text_labels_are_numbered_in_the_order_given(tmp_path: Path) -> None:
    path = _write(tmp_path, ["walk"] * 3 + ["sit"] * 3)
    data = _load(_source(path, classes=("sit", "stand", "walk")))
    assert data.y.tolist() == [2, 0]
    assert data.classes == 3


def test_text_labels_without_their_order_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, ["walk"] * 3)
    text = _refusal(_source(path))
    assert "$.data.csv.label: expected a whole number from 0, found 'walk'" in text
    assert f"({path}:2)" in text
    assert "list them in `classes`" in text


def test_unknown_text_label_is_refused_by_line(tmp_path: Path) -> None:
    path = _write(tmp_path, ["walk", "walk", "fly"])
    text = _refusal(_source(path, classes=("sit", "walk")))
    assert f"expected one of sit, walk, found 'fly' ({path}:4)" in text


def test_number_of_classes_must_agree_with_the_names(tmp_path: Path) -> None:
    path = _write(tmp_path, ["walk"] * 3)
    text = _refusal(_source(path, classes=("sit", "walk")), classes=3)
    assert "$.data.classes: expected 2, as many as csv.classes lists, found 3" in text


@pytest.mark.parametrize("label", ["-1", "1.5", "", "1e3", "٣", "9999999999"])
def test_labels_that_are_no_class_numbers_are_refused(tmp_path: Path, label: str) -> None:
    assert "$.data.csv.label: expected a whole number from 0" in _refusal(
        _source(_write(tmp_path, [label] * 3))
    )


@pytest.mark.parametrize("cell", ["", "abc", "nan", "inf", "1,5;"])
def test_bad_cell_is_named_by_column_and_line(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "walk.csv"
    path.write_text(f'ax,ay,activity\n1,2,0\n\n1,"{cell}",0\n')
    text = _refusal(_source(path))
    assert (
        f"$.data.csv.columns: expected a finite number in column 'ay', found {cell!r} ({path}:4)"
        in text
    )


def test_short_row_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "walk.csv"
    path.write_text("ax,ay,activity\n1,2,0\n1,2\n")
    assert f"expected at least 3 cells, found 2 ({path}:3)" in _refusal(_source(path))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"columns": ("ax", "az")}, "$.data.csv.columns[1]: expected one column 'az'"),
        ({"label": "class"}, "$.data.csv.label: expected one column 'class'"),
        ({"group": "run"}, "$.data.csv.group: expected one column 'run'"),
    ],
)
def test_unknown_column_is_refused_with_those_there_are(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    text = _refusal(_source(_write(tmp_path, ["0"] * 3), **changes))
    assert expected in text
    assert "whose header holds 't', 'ax', 'ay', 'activity', 'person'" in text


def test_column_that_appears_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "walk.csv"
    path.write_text("ax,ax,ay,activity\n1,1,2,0\n")
    assert "expected one column 'ax'" in _refusal(_source(path))


def test_too_few_rows_for_a_window_are_refused(tmp_path: Path) -> None:
    text = _refusal(_source(_write(tmp_path, ["0"] * 2)))
    assert "$.data.csv.window: expected at least one window of 3 rows with one label" in text
    assert "which has 2 rows" in text
    assert "which has 3 rows" in _refusal(_source(_write(tmp_path, list("010"))))
    assert "which has 0 rows" in _refusal(_source(_write(tmp_path, [])))


def test_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "walk.csv"
    path.write_text("")
    assert "whose header holds nothing" in _refusal(_source(path))


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "walk.csv"
    text = _refusal(_source(path))
    assert f"$.data.csv.path: expected a readable file, {path}: No such file" in text
    path.write_bytes(b"ax,ay,activity\n\xff\xfe,1,0\n")
    assert "$.data.csv.path: expected a CSV file in UTF-8" in _refusal(_source(path))
    packed = tmp_path / "walk.csv.gz"
    packed.write_bytes(b"ax,ay,activity\n")
    assert "$.data.csv.path: expected a readable file" in _refusal(_source(packed))
    packed.write_bytes(gzip.compress(b"ax,ay,activity\n1,2,0\n")[:-9])
    assert "$.data.csv.path: expected a CSV file" in _refusal(_source(packed))
    damaged = bytearray(gzip.compress(_write(tmp_path, ["0"] * 500).read_bytes()))
    damaged[40:60] = bytes(20)
    packed.write_bytes(damaged)
    assert "$.data.csv.path: expected " in _refusal(_source(packed))


def test_gzip_other_delimiters_and_byte_order_marks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "walk.csv.gz"
    text = "\ufeffax; ay ;activity\r\n1;2;0\r\n3;4;0\r\n5;6;0\r\n"
    path.write_bytes(gzip.compress(text.encode()))
    data = _load(_source(path, delimiter=";"))
    assert data.x.tolist() == [[[1, 3, 5], [2, 4, 6]]]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("columns: [], window: 3", "$.csv.columns: "),
        ("columns: [a, a], window: 3", "$.csv: expected `columns` without repeats"),
        ("columns: [a], window: 3, classes: [b, b]", "$.csv: expected `classes` without repeats"),
        ("columns: [a], window: 0", "$.csv.window: Expected `int` >= 1"),
        ("columns: [a], window: 3, stride: 0", "$.csv.stride: Expected `int` >= 1"),
        ("columns: [a], window: 3, delimiter: ab", "$.csv.delimiter: "),
        ("columns: [a], window: 3, delimiter: '\"'", "$.csv: expected `delimiter` to be no quote"),
        ("columns: [a], window: 3, mixed: first", "$.csv.mixed: expected one of"),
    ],
)
def test_settings_that_cannot_be_met_name_their_field(fields: str, expected: str) -> None:
    yaml = f"csv: {{path: p, label: l, {fields}}}".encode()
    with pytest.raises(ConfigError) as caught:
        parse_settings(yaml, DataSettings, source="agent.yaml")
    assert expected in str(caught.value)
