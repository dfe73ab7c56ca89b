"""Where samples come from: every source on real files, every fault named by file and field."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.datasets import (
    CsvSource,
    DataSettings,
    IdxSource,
    LabelledData,
    NormalizeSettings,
    NpzSource,
    PartitionSettings,
    load_data,
)
from edge_agent.datasets.samples import FASHION_MNIST_TEST, digits_test, digits_train
from wire.errors import ConfigError
from wire.settings import parse_settings

X = np.arange(24, dtype=np.float32).reshape(4, 6) / 24
Y = np.array([0, 1, 2, 1])


def _load(**blocks: Any) -> LabelledData:
    return load_data(DataSettings(**blocks), source="agent.yaml")


def _refusal(**blocks: Any) -> str:
    """Load, expect a ConfigError of one line that starts with the file, and return its text."""
    with pytest.raises(ConfigError) as caught:
        _load(**blocks)
    text = str(caught.value)
    assert text.startswith("agent.yaml: $.data")
    assert "\n" not in text
    return text


def _npz(tmp_path: Path, x: Any = X, y: Any = Y, **more: Any) -> NpzSource:
    np.savez(tmp_path / "d.npz", x=x, y=y, **more)
    return NpzSource(path=str(tmp_path / "d.npz"))


# npz -------------------------------------------------------------------------------------------


def test_npz_becomes_contiguous_float32_and_int64(tmp_path: Path) -> None:
    data = _load(npz=_npz(tmp_path, np.asfortranarray(X.astype(np.float64)), Y.astype(np.uint8)))
    assert data.x.dtype == np.float32
    assert data.x.flags.c_contiguous
    assert data.y.dtype == np.int64
    assert np.array_equal(data.x, X)
    assert np.array_equal(data.y, Y)
    assert (data.classes, len(data), data.sample_shape) == (3, 4, (6,))
    assert data.label_counts.tolist() == [1, 2, 1]


def test_npz_arrays_may_have_other_names(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", images=X, targets=Y)
    data = _load(npz=NpzSource(path=str(tmp_path / "d.npz"), x="images", y="targets"))
    assert np.array_equal(data.y, Y)


def test_bytes_are_pixels_and_other_integers_are_numbers(tmp_path: Path) -> None:
    pixels = np.array([[0, 51], [102, 255]], dtype=np.uint8)
    data = _load(npz=_npz(tmp_path, pixels, Y[:2]))
    assert np.array_equal(data.x, pixels.astype(np.float32) / 255)
    data = _load(npz=_npz(tmp_path, pixels.astype(np.int16), Y[:2]))
    assert np.array_equal(data.x, pixels.astype(np.float32))
    data = _load(npz=_npz(tmp_path, pixels, Y[:2]), scale=1.0)
    assert np.array_equal(data.x, pixels.astype(np.float32))


def test_whole_numbers_stored_as_floats_are_labels(tmp_path: Path) -> None:
    assert _load(npz=_npz(tmp_path, y=Y.astype(np.float64))).y.tolist() == Y.tolist()


def test_npz_without_the_array_names_those_it_holds(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=X, y=Y)
    text = _refusal(npz=NpzSource(path=str(tmp_path / "d.npz")))
    assert text == (
        f"agent.yaml: $.data.npz.x: expected an array 'x' in {tmp_path}/d.npz, "
        "which holds 'images', 'y'"
    )


def test_npz_that_is_missing_or_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    npz = NpzSource(path=str(path))
    assert f"$.data.npz.path: expected a readable .npz file, {path}: No such" in _refusal(npz=npz)
    path.write_bytes(b"PK\x03\x04 broken")
    assert "expected an .npz archive" in _refusal(npz=npz)
    path.write_text("x,y\n1,2\n")
    assert "expected an .npz archive" in _refusal(npz=npz)
    path.write_bytes(b"")
    assert "expected an .npz archive" in _refusal(npz=npz)
    with path.open("wb") as file:
        np.save(file, X)
    assert "is one array (.npy)" in _refusal(npz=npz)
    assert "Is a directory" in _refusal(npz=NpzSource(path=str(tmp_path)))


def test_npz_cut_short_is_refused(tmp_path: Path) -> None:
    npz = _npz(tmp_path, np.random.default_rng(0).normal(size=(50, 6)), np.zeros(50, dtype=int))
    raw = bytearray(Path(npz.path).read_bytes())
    raw[200:260] = bytes(60)
    Path(npz.path).write_bytes(raw)
    assert "$.data.npz.x: expected 'x'" in _refusal(npz=npz)


def test_pickled_arrays_are_never_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    np.savez(tmp_path / "d.npz", x=np.array([Evil()], dtype=object), y=Y)
    assert "whole array of numbers" in _refusal(npz=NpzSource(path=str(tmp_path / "d.npz")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (X, Y[:3], "one label per sample in {file}, found 4 samples, 3 labels"),
        (X[:0], Y[:0], "at least one sample in {file}, found shape (0, 6)"),
        (np.zeros((4, 0)), Y, "at least one sample in {file}, found shape (4, 0)"),
        (X[:, 0], Y, "x of numbers with shape (samples, ...) in {file}, found float32 of shape"),
        (X.astype(str), Y, "x of numbers with shape (samples, ...) in {file}, found <U32"),
        (X.astype(complex), Y, "x of numbers with shape"),
        (X, np.eye(4), "y of whole numbers with shape (samples,) in {file}, found float64 of"),
        (X, np.array(["a", "b", "a", "b"]), "y of whole numbers with shape"),
        (X, Y + 0.5, "whole numbers as labels in {file}"),
        (X, Y * np.nan, "whole numbers as labels in {file}"),
        (np.full_like(X, np.nan), Y, "finite float32 numbers in {file}, found nan in sample 0"),
        (X.astype(np.float64) * 1e300, Y, "finite float32 numbers in {file}, found inf"),
    ],
)
def test_arrays_that_cannot_be_samples_are_refused(
    tmp_path: Path, x: Any, y: Any, expected: str
) -> None:
    text = _refusal(npz=_npz(tmp_path, x, y))
    assert text.startswith("agent.yaml: $.data.npz: expected ")
    assert expected.format(file=tmp_path / "d.npz") in text


def test_labels_out_of_range_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    assert _refusal(npz=_npz(tmp_path, y=Y), classes=2) == (
        f"agent.yaml: $.data.classes: expected labels from 0 to 1 in {tmp_path}/d.npz, "
        "found 2 at sample 2 (1 such labels)"
    )
    assert "found -1 at sample 0 (4 such labels)" in _refusal(npz=_npz(tmp_path, y=Y * 0 - 1))


def test_given_classes_may_exceed_the_labels_seen(tmp_path: Path) -> None:
    data = _load(npz=_npz(tmp_path), classes=5)
    assert data.label_counts.tolist() == [1, 2, 1, 0, 0]


# idx -------------------------------------------------------------------------------------------


def _idx_bytes(array: np.ndarray, code: int = 0x08) -> bytes:
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()
    )


def _idx(tmp_path: Path, images: bytes, labels: bytes) -> IdxSource:
    (tmp_path / "images").write_bytes(images)
    (tmp_path / "labels").write_bytes(labels)
    return IdxSource(images=str(tmp_path / "images"), labels=str(tmp_path / "labels"))


IMAGES = np.arange(4 * 3 * 2, dtype=np.uint8).reshape(4, 3, 2) * 10
LABELS = Y.astype(np.uint8)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_images_get_a_channel_and_values_up_to_one(tmp_path: Path, pack: Any) -> None:
    idx = _idx(tmp_path, pack(_idx_bytes(IMAGES)), pack(_idx_bytes(LABELS)))
    data = _load(idx=idx)
    assert data.x.shape == (4, 1, 3, 2)
    assert np.array_equal(data.x[:, 0], IMAGES.astype(np.float32) / 255)
    assert np.array_equal(data.y, Y)


def test_idx_of_big_endian_numbers_and_channels(tmp_path: Path) -> None:
    images = np.linspace(-1, 1, 4 * 2 * 3 * 2).reshape(4, 2, 3, 2).astype(">f4")
    idx = _idx(tmp_path, _idx_bytes(images, 0x0D), _idx_bytes(Y.astype(">i4"), 0x0C))
    data = _load(idx=idx)
    assert np.array_equal(data.x, images.astype(np.float32))
    assert np.array_equal(data.y, Y)


def test_fashion_mnist_is_read_whole() -> None:
    data = _load(idx=FASHION_MNIST_TEST, classes=10)
    assert data.x.shape == (10_000, 1, 28, 28)
    assert data.label_counts.tolist() == [1000] * 10
    assert (data.x.min(), data.x.max()) == (0.0, 1.0)
    assert data.x.mean() == pytest.approx(0.2868, abs=1e-3)


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        (b"", _idx_bytes(LABELS), "idx.images: expected an IDX file (MNIST format)"),
        (b"\x89PNG", _idx_bytes(LABELS), "idx.images: expected an IDX file"),
        (b"\0\0\x07\x03", _idx_bytes(LABELS), "idx.images: expected an IDX file"),
        (b"\0\0\x08\x03\0\0", _idx_bytes(LABELS), "idx.images: expected 3 dimension sizes"),
        (_idx_bytes(IMAGES)[:-1], _idx_bytes(LABELS), "expected 40 bytes for shape (4, 3, 2)"),
        (_idx_bytes(IMAGES) + b"x", _idx_bytes(LABELS), "expected 40 bytes for shape (4, 3, 2)"),
        (_idx_bytes(IMAGES[0]), _idx_bytes(LABELS), "idx.images: expected images with 3 dim"),
        (_idx_bytes(IMAGES), _idx_bytes(IMAGES), "idx.labels: expected labels with 1 dimension"),
        (_idx_bytes(IMAGES), _idx_bytes(LABELS[:3]), "found 4 samples, 3 labels"),
        (
            gzip.compress(_idx_bytes(IMAGES), mtime=0)[:-9],
            _idx_bytes(LABELS),
            "expected a whole gzip file",
        ),
        (b"\x1f\x8b\x08rubbish....", _idx_bytes(LABELS), "expected a whole gzip file"),
        (b"\x1f\x8b\x01rubbish....", _idx_bytes(LABELS), "expected a whole gzip file"),
    ],
)
def test_idx_that_is_damaged_is_refused(
    tmp_path: Path, images: bytes, labels: bytes, expected: str
) -> None:
    assert expected in _refusal(idx=_idx(tmp_path, images, labels))


def test_idx_that_is_missing_is_refused(tmp_path: Path) -> None:
    idx = _idx(tmp_path, _idx_bytes(IMAGES), b"")
    Path(idx.labels).unlink()
    assert f"$.data.idx.labels: expected a readable file, {idx.labels}" in _refusal(idx=idx)


# function --------------------------------------------------------------------------------------


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"user_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(
        "import numpy as np\n"
        "X = [[0.0, 1.0], [2.0, 3.0]]\n"
        "def pair(): return X, [0, 1]\n"
        "def named(): return {'x': np.array(X), 'y': np.array([0, 1])}\n"
        "def three(): return 1, 2, 3\n"
        "def ragged(): return [[1], [1, 2]], [0, 1]\n"
        "def fails(): raise RuntimeError('sensor is\\nasleep')\n"
        "number = 3\n"
    )
    (tmp_path / f"{name}_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize("function", ["pair", "named"])
def test_function_returns_a_pair_or_a_dict(user_module: str, function: str) -> None:
    data = _load(function=f"{user_module}:{function}")
    assert data.x.tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert data.y.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("{m}", "expected `module:function`, found"),
        ("{m}:", "expected `module:function`, found"),
        (":pair", "expected `module:function`, found"),
        ("{m}:a.b", "expected `module:function`, found"),
        ("no_such_module_here:f", "expected an importable module 'no_such_module_here'"),
        ("{m}_broken:f", "importing it raised ZeroDivisionError"),
        ("{m}:absent", "expected a function 'absent' in module"),
        ("{m}:number", "expected a function 'number' in module"),
        ("{m}:three", "to return (x, y) or a dict with x and y, found tuple"),
        ("{m}:ragged", "expected arrays from"),
        ("{m}:fails", "it raised RuntimeError: sensor is asleep"),
    ],
)
def test_function_that_cannot_be_used_is_refused(
    user_module: str, function: str, expected: str
) -> None:
    text = _refusal(function=function.format(m=user_module))
    assert text.startswith("agent.yaml: $.data.function: ")
    assert expected in text


def test_digits_are_split_by_class_and_never_shared() -> None:
    (x_train, y_train), (x_test, y_test) = digits_train(), digits_test()
    assert x_train.shape[1:] == (1, 8, 8)
    assert len(y_train) + len(y_test) == 1797
    assert (x_train.min(), x_train.max(), x_train.dtype) == (0.0, 1.0, np.float32)
    shares = np.bincount(y_test) / (np.bincount(y_train) + np.bincount(y_test))
    assert shares == pytest.approx(0.2, abs=0.004)
    train_rows = {row.tobytes() for row in x_train}
    assert not any(row.tobytes() in train_rows for row in x_test)
    assert np.array_equal(digits_test()[0], x_test)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    text = _refusal(function="edge_agent.datasets.samples:digits_train")
    assert "$.data.function: expected scikit-learn" in text


# what applies to all -----------------------------------------------------------------------------


def test_limit_keeps_the_first_samples(tmp_path: Path) -> None:
    data = _load(npz=_npz(tmp_path), limit=2)
    assert data.y.tolist() == [0, 1]
    assert data.classes == 3


def test_samples_are_reshaped_scaled_and_normalised_in_this_order(tmp_path: Path) -> None:
    data = _load(
        npz=_npz(tmp_path),
        shape=(2, 3),
        scale=24.0,
        normalize=NormalizeSettings(mean=(1.0, 2.0), std=(0.5, 4.0)),
    )
    x = X.reshape(4, 2, 3) * 24
    assert np.allclose(data.x[:, 0], (x[:, 0] - 1) / 0.5)
    assert np.allclose(data.x[:, 1], (x[:, 1] - 2) / 4)
    assert data.x.flags.c_contiguous


def test_one_mean_serves_all_channels(tmp_path: Path) -> None:
    data = _load(npz=_npz(tmp_path), normalize=NormalizeSettings(mean=0.5))
    assert np.allclose(data.x, X - 0.5)


def test_loading_never_changes_the_arrays_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept_arrays.py").write_text(
        "import numpy as np\nX = np.ones((2, 3), np.float32)\ndef f(): return X, np.array([0, 1])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        data = _load(function="kept_arrays:f", scale=2.0, normalize=NormalizeSettings(mean=1.0))
        assert (data.x == 1.0).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shape": (7,)}, "$.data.shape: expected a shape of 6 numbers"),
        ({"normalize": NormalizeSettings(mean=(1.0, 2.0))}, "$.data.normalize.mean: expected one"),
        ({"normalize": NormalizeSettings(std=(1.0, 2.0))}, "$.data.normalize.std: expected one"),
        ({"scale": 1e38}, "$.data.npz: expected finite float32 numbers"),
    ],
)
def test_options_that_do_not_fit_the_samples_are_refused(
    tmp_path: Path, options: dict[str, Any], expected: str
) -> None:
    assert expected in _refusal(npz=_npz(tmp_path, X * 100), **options)


def test_partition_takes_this_device_its_part(tmp_path: Path) -> None:
    x, y = np.arange(100.0).reshape(100, 1), np.arange(100) % 4
    npz = _npz(tmp_path, x, y)
    parts = [
        _load(
            npz=npz,
            partition=PartitionSettings(
                devices=5, index=index, scheme="dirichlet", classes_per_device=2
            ),
        )
        for index in range(5)
    ]
    held = np.concatenate([part.x[:, 0] for part in parts])
    assert np.array_equal(np.sort(held), np.arange(100))
    assert all((part.label_counts > 0).sum() == 2 for part in parts)
    assert all(part.classes == 4 for part in parts)
    assert all(np.array_equal(part.x[:, 0] % 4, part.y) for part in parts)


def test_partition_that_cannot_be_met_is_refused(tmp_path: Path) -> None:
    npz = _npz(tmp_path)
    part = PartitionSettings(devices=2, index=0, scheme="dirichlet", classes_per_device=1)
    text = _refusal(npz=npz, partition=part)
    assert "$.data.partition: expected devices x classes_per_device of at least 3" in text
    part = PartitionSettings(devices=9, index=8)
    text = _refusal(npz=npz, partition=part)
    assert "$.data.partition.devices: expected at most 4 devices" in text


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("{}", "$: expected exactly one of npz, idx, csv, function; found none"),
        ("{npz: {path: a}, function: 'a:b'}", "found npz, function"),
        ("{npz: {path: a, z: 1}}", "$.npz: Object contains unknown field `z`"),
        ("{npz: {path: ''}}", "$.npz.path: "),
        ("{idx: {images: a}}", "$.idx: Object missing required field `labels`"),
        ("{function: f, classes: 0}", "$.classes: Expected `int` >= 1"),
        ("{function: f, scale: 0}", "expected `scale` to be finite and not 0"),
        ("{function: f, normalize: {std: 0}}", "$.normalize: expected `std` to be finite and"),
        ("{function: f, normalize: {mean: .nan}}", "$.normalize: expected `mean` to be finite"),
        ("{function: f, normalize: {mean: []}}", "$.normalize: expected at least one number"),
        (
            "{function: f, partition: {devices: 4, index: 4}}",
            "$.partition: expected `index` from 0 to 3 (`devices` - 1), found 4",
        ),
        (
            "{function: f, partition: {devices: 4, index: 0, scheme: shards}}",
            "$.partition.scheme: expected one of dirichlet, iid, found 'shards'",
        ),
        (
            "{function: f, partition: {devices: 4, index: 0, alpha: .inf}}",
            "$.partition.alpha: Expected `float` <= 1000000.0",
        ),
    ],
)
def test_settings_that_contradict_themselves_name_their_field(yaml: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(yaml.encode(), DataSettings, source="agent.yaml")
    assert str(caught.value).startswith("agent.yaml: ")
    assert expected in str(caught.value)


def test_yaml_block_reads_as_documented() -> None:
    yaml = b"""
    csv: {path: walk.csv, columns: [ax, ay], label: activity, window: 50, classes: [sit, walk]}
    classes: 2
    normalize: {mean: [0, 1], std: 2}
    partition: {scheme: dirichlet, devices: 8, index: 3, classes_per_device: 2, alpha: 3, seed: 1}
    """
    settings = parse_settings(yaml, DataSettings, source="agent.yaml")
    assert settings.csv == CsvSource(
        path="walk.csv",
        columns=("ax", "ay"),
        label="activity",
        window=50,
        classes=("sit", "walk"),
    )
    assert settings.partition is not None
    assert settings.partition.alpha == 3.0


def test_importing_the_package_loads_neither_torch_nor_scikit_learn() -> None:
    code = (
        "import sys, edge_agent.datasets, edge_agent.datasets.samples;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'sklearn', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
