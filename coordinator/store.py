"""Where a run's state lives: a few named records, written together or not at all.

One coordinator on one host uses SQLite; several share Redis. Both are reached through one small
interface, and hold small values only: tensors are in checkpoint files, the store points at them.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import msgspec

from wire.credentials import SCHEME as CREDENTIAL_SCHEME
from wire.credentials import read_secret
from wire.errors import ConfigError, ModelError, TransportError

if TYPE_CHECKING:
    from redis import Redis

T = TypeVar("T")

SQLITE_BUSY_TIMEOUT_S = 10.0
# Written into the file, so that a later layout can be told from this one.
SQLITE_LAYOUT_VERSION = 1

REDIS_KEY_PREFIX = "splitfleet:"
REDIS_TIMEOUT_S = 5.0
REDIS_HEALTH_CHECK_INTERVAL_S = 30
REDIS_RETRIES = 5
REDIS_BACKOFF_S = 0.05
REDIS_MAX_BACKOFF_S = 1.0


class RecordError(ModelError):
    """A stored record that does not read as its type; the text names its key."""


class StateStore(Protocol):
    """Named bytes with atomic writes. Methods may be called from any thread.

    All raise TransportError when the store cannot be reached or refuses.
    """

    def get(self, key: str) -> bytes | None:
        """Return the value of ``key``, or None."""

    def put_many(self, items: Mapping[str, bytes | None]) -> None:
        """Write all of ``items`` or none of them; None deletes. Returns once they are durable."""

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys that start with ``prefix``, sorted by code point."""

    def close(self) -> None:
        """Release the connection; closing twice is harmless."""


def open_store(
    url: str, *, create: bool = True, source: str | None = None, field: str = "$.state"
) -> StateStore:
    """Open ``sqlite:///relative``, ``sqlite:////absolute`` or ``redis[s]://host:port/db``.

    ``credential:NAME`` is a file that holds such a URL: one with a password is a secret.
    Without ``create`` a missing SQLite file is an error, for commands that only look. Raises
    ConfigError for a URL or file that cannot be a store, naming ``source`` and ``field``;
    TransportError when Redis does not answer or the file stays locked.
    """
    if url.startswith(CREDENTIAL_SCHEME):
        url = read_secret(url, field=field)
    try:
        scheme = urlsplit(url).scheme
        if scheme == "sqlite":
            return SqliteStore(_sqlite_path(url), create=create)
        if scheme in ("redis", "rediss"):
            return RedisStore.connect(url)
    except (ValueError, sqlite3.Error) as exc:
        raise ConfigError(
            f"expected a usable state store, {masked_url(url)}: {exc}", source=source, field=field
        ) from exc
    raise ConfigError(
        "expected sqlite:///FILE, redis://HOST:PORT/DB or rediss://HOST:PORT/DB, "
        f"found {masked_url(url)!r}",
        source=source,
        field=field,
    )


def masked_url(url: str) -> str:
    """Return the URL without user name, password and query, for messages."""
    head, separator, tail = url.partition("://")
    if not separator:
        return url
    return f"{head}://{tail.rpartition('@')[2].partition('?')[0]}"


def _sqlite_path(url: str) -> Path:
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc or not path.startswith("/") or path.endswith("/"):
        raise ValueError("expected three slashes before a relative file, four before an absolute")
    if parts.query or parts.fragment:
        raise ValueError("expected a file name without ? and #")
    return Path(path[1:])


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ValueError(f"{path}: {exc.strerror}") from exc


class SqliteStore:
    """A state store in one SQLite file, which other processes may read while it is written."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Open or create the file; raises sqlite3.Error or ValueError if it cannot be one."""
        if create:
            _make_directory(path.parent)
        elif not path.is_file():
            raise ValueError(f"{path} does not exist")
        self._path = path
        # One connection for all threads: statements are short, and the lock keeps them apart.
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(
            path, timeout=SQLITE_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare()
        except sqlite3.OperationalError as exc:
            self._connection.close()
            if exc.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                raise TransportError(f"state store {path}: {exc}") from exc
            raise
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        # WAL: readers do not wait for the writer. FULL: a commit survives a power cut.
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version == SQLITE_LAYOUT_VERSION:
            return
        if version != 0:
            raise ValueError(f"expected layout {SQLITE_LAYOUT_VERSION}, found {version}")
        self._connection.execute("BEGIN IMMEDIATE")
        with self._connection:
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS records (key TEXT PRIMARY KEY, value BLOB NOT NULL)"
            )
            self._connection.execute(f"PRAGMA user_version={SQLITE_LAYOUT_VERSION:d}")

    def get(self, key: str) -> bytes | None:
        """Return the value of ``key``, or None."""
        with self._lock, self._converted_errors():
            row = self._connection.execute(
                "SELECT value FROM records WHERE key = ?", (key,)
            ).fetchone()
        return None if row is None else bytes(row[0])

    def put_many(self, items: Mapping[str, bytes | None]) -> None:
        """Write all of ``items`` in one transaction; None deletes."""
        if not items:
            return
        written = [(key, value) for key, value in items.items() if value is not None]
        deleted = [(key,) for key, value in items.items() if value is None]
        with self._lock, self._converted_errors():
            # IMMEDIATE: wait for another writer here, not in the middle of the transaction.
            self._connection.execute("BEGIN IMMEDIATE")
            with self._connection:
                self._connection.executemany(
                    "INSERT INTO records (key, value) VALUES (?, ?) "
                    "ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                    written,
                )
                self._connection.executemany("DELETE FROM records WHERE key = ?", deleted)

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys that start with ``prefix``, sorted."""
        with self._lock, self._converted_errors():
            rows = self._connection.execute(
                "SELECT key FROM records WHERE key >= ?1 AND substr(key, 1, length(?1)) = ?1 "
                "ORDER BY key",
                (prefix,),
            ).fetchall()
        return [row[0] for row in rows]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _converted_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise TransportError(f"state store {self._path}: {exc}") from exc


class RedisStore:
    """A state store in a Redis database, below one key prefix, that outlives lost connections.

    A write is one MULTI/EXEC. It holds absolute values, so that repeating it after a connection
    was lost in the middle is harmless. How durable it is, is the server's own setting.
    """

    def __init__(self, client: Redis, *, name: str) -> None:
        """Use a client that returns bytes; ``name`` stands for it in messages."""
        from redis.backoff import ExponentialBackoff  # noqa: PLC0415 - SQLite needs no Redis client
        from redis.retry import Retry  # noqa: PLC0415

        self._client = client
        self._name = name
        self._retry = Retry(ExponentialBackoff(REDIS_MAX_BACKOFF_S, REDIS_BACKOFF_S), REDIS_RETRIES)

    @classmethod
    def connect(cls, url: str) -> RedisStore:
        """Connect and check that the server answers; raises ValueError for a URL it cannot use."""
        import redis  # noqa: PLC0415
        from redis.backoff import NoBackoff  # noqa: PLC0415
        from redis.retry import Retry  # noqa: PLC0415

        _check_redis_url(url)
        client = redis.Redis.from_url(
            url,
            decode_responses=False,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            health_check_interval=REDIS_HEALTH_CHECK_INTERVAL_S,
            # The client's own retries nest, once per command and once per connection, and repeat
            # refused passwords too; this store retries instead.
            retry=Retry(NoBackoff(), 0),
        )
        store = cls(client, name=masked_url(url))
        try:
            store._call(client.ping)
        except BaseException:
            client.close()
            raise
        return store

    def get(self, key: str) -> bytes | None:
        """Return the value of ``key``, or None."""
        value = self._call(lambda: self._client.get(REDIS_KEY_PREFIX + key))
        return None if value is None else bytes(value)  # type: ignore[arg-type]

    def put_many(self, items: Mapping[str, bytes | None]) -> None:
        """Write all of ``items`` in one MULTI/EXEC; None deletes."""
        if items:
            self._call(lambda: self._write(items))

    def _write(self, items: Mapping[str, bytes | None]) -> None:
        with self._client.pipeline(transaction=True) as pipeline:
            for key, value in items.items():
                if value is None:
                    pipeline.delete(REDIS_KEY_PREFIX + key)
                else:
                    pipeline.set(REDIS_KEY_PREFIX + key, value)
            pipeline.execute()

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys that start with ``prefix``, sorted."""
        full_prefix = REDIS_KEY_PREFIX + prefix
        pattern = "".join(f"\\{char}" if char in "*?[]^\\" else char for char in full_prefix)
        # SCAN, not KEYS, leaves the server free for others; it may name a key twice.
        found = self._call(lambda: set(self._client.scan_iter(match=f"{pattern}*")))
        return sorted(key.decode().removeprefix(REDIS_KEY_PREFIX) for key in found)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _call(self, operation: Callable[[], T]) -> T:
        """Run ``operation``, again with back-off where the connection was lost."""
        from redis.exceptions import RedisError  # noqa: PLC0415

        try:
            return self._retry.call_with_retry(
                lambda: self._refuse_bad_password(operation), lambda _error: None
            )
        except RedisError as exc:
            raise TransportError(f"state store {self._name}: {exc}") from exc

    def _refuse_bad_password(self, operation: Callable[[], T]) -> T:
        """Run ``operation``; the client counts a bad password as a lost connection, we do not."""
        from redis.exceptions import AuthenticationError  # noqa: PLC0415

        try:
            return operation()
        except AuthenticationError as exc:
            raise TransportError(f"state store {self._name}: {exc}") from exc


def _check_redis_url(url: str) -> None:
    """Refuse what the client would read as something else, such as a database that is no number."""
    parts = urlsplit(url)
    _ = parts.port  # raises ValueError for a port that is none
    database = parts.path.strip("/")
    if not parts.hostname:
        raise ValueError("expected a host name")
    if database and not (database.isascii() and database.isdigit()):
        raise ValueError(f"expected a database number after the host, found {database!r}")


def get_record(store: StateStore, key: str, record_type: type[T]) -> T | None:
    """Read a JSON record, None if there is none; raises RecordError if it is of another form."""
    raw = store.get(key)
    return None if raw is None else _decode_record(key, raw, record_type)


def get_records(store: StateStore, prefix: str, record_type: type[T]) -> dict[str, T]:
    """Read all JSON records whose keys start with ``prefix``, by key, sorted."""
    found: dict[str, T] = {}
    for key in store.keys(prefix):
        record = get_record(store, key, record_type)
        if record is not None:  # deleted since the keys were listed
            found[key] = record
    return found


def put_records(store: StateStore, records: Mapping[str, msgspec.Struct | None]) -> None:
    """Write JSON records together or not at all; None deletes."""
    store.put_many(encode_records(records))


def encode_records(records: Mapping[str, msgspec.Struct | None]) -> dict[str, bytes | None]:
    """Encode records as JSON, to write them together with other values."""
    return {
        key: None if record is None else msgspec.json.encode(record)
        for key, record in records.items()
    }


def _decode_record(key: str, raw: bytes, record_type: type[T]) -> T:
    try:
        return msgspec.json.decode(raw, type=record_type)
    except msgspec.DecodeError as exc:
        raise RecordError(
            f"state store: record {key!r}: expected a {record_type.__name__} ({exc})"
        ) from exc
