"""Stores entries in a folder, by key, so that they outlive the process.

Keys and values are text and bytes; verdicts.py gives them their meaning. A reader never waits, and gets the value that
was written under its very key, or nothing: an entry that is truncated, corrupt, of another format or of another key is
a miss. Writers replace whole files, so any number of processes may share a folder, and one that dies during a write
leaves at most a file that nobody reads. Where the folder cannot be written, nothing is kept, and one log line says so.
"""

import contextlib
import hashlib
import logging
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from cudnn_flex_compile.locks import new_lock

log = logging.getLogger("cudnn_flex_compile")

MAGIC = b"cudnnflx"
FORMAT = 1
DIGEST = 32
HEADER = struct.Struct(f"<8sIIQ{DIGEST}s")  # magic, format, bytes of the key, bytes of the value, digest of both
SUFFIX, UNFINISHED = ".plan", ".part"
ABANDONED = 3600.0  # seconds after which an unfinished file counts as abandoned
SHARE = 16  # the folder is measured again after this process has written each such share of the bound
LOW = 7 / 8  # the share of the bound that is left after an eviction, so that the next write does not evict again


class _File(NamedTuple):
    path: Path
    size: int
    used: float


class Store:
    """Maps texts to bytes. Any thread may use it.

    Args:
        folder: made when it is first written to, for this user only. Its contents are trusted: plans are code.
        bound: bytes that all entries together may take; the least recently used are dropped first. Several processes
            may exceed it by a sixteenth each.
    """

    def __init__(self, folder: Path, bound: int) -> None:
        self.folder, self.bound = folder, bound
        self._room = 0  # bytes that may be written before the folder is measured again
        self._lock = new_lock()
        self._writable = True

    def read(self, key: str) -> bytes | None:
        """The value that was written under this key, which counts as used now; None without one."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:  # there is none, or this user may not read it
            return None
        value = _unpacked(data, key.encode())
        if value is None:
            log.debug("cudnn_flex: %s is no entry of its key and is not used", path)
            return None
        with contextlib.suppress(OSError):  # evicted meanwhile, or a folder that is only read
            os.utime(path)
        return value

    def write(self, key: str, value: bytes) -> None:
        """Keeps a value, in place of an older one of this key."""
        data = _packed(key.encode(), value)
        if not self._writable or len(data) > self.bound:
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(len(data))
            self._replace(self._path(key), data)
        except (OSError, NotImplementedError) as error:  # the latter from a file system without locks
            self._writable = False
            log.warning("cudnn_flex: plans are not kept beyond this process: %s", error)

    def size(self) -> tuple[int, int]:
        """The number of entries, and their bytes together."""
        try:
            sizes = [file.size for file in self._files()]
        except OSError:  # no such folder yet
            sizes = []
        return len(sizes), sum(sizes)

    def _path(self, key: str) -> Path:
        return self.folder / (hashlib.blake2b(key.encode(), digest_size=20).hexdigest() + SUFFIX)

    def _replace(self, path: Path, data: bytes) -> None:
        number, name = tempfile.mkstemp(UNFINISHED, dir=self.folder)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(data)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _make_room(self, size: int) -> None:
        with self._lock:
            if self._room < size:
                total = sum(entry.size for entry in self._files())
                if total + size > self.bound:
                    total = self._evict(size)
                self._room = min(self.bound - total, max(self.bound // SHARE, size))
            self._room -= size

    def _evict(self, size: int) -> int:
        """Drops the least recently used entries until `size` more bytes fit, and returns the bytes that are left.

        One process evicts at a time; others write meanwhile.
        """
        try:
            with FileLock(self.folder / "evict.lock", timeout=0):
                return self._drop(min(int(LOW * self.bound), self.bound - size))
        except Timeout:
            return 0

    def _drop(self, most: int) -> int:
        files = sorted(self._files(), key=lambda file: file.used)
        total = sum(file.size for file in files)
        for file in files:
            if total <= most:
                break
            with contextlib.suppress(FileNotFoundError):
                file.path.unlink()
            total -= file.size
        return total

    def _files(self) -> Iterator[_File]:
        """All entries, and the files that dead writers left, which count as never used."""
        now = time.time()
        with os.scandir(self.folder) as found:
            for entry in found:
                if not entry.name.endswith((SUFFIX, UNFINISHED)):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if entry.name.endswith(SUFFIX):
                        yield _File(Path(entry.path), status.st_size, status.st_mtime)
                    elif now - status.st_mtime > ABANDONED:
                        yield _File(Path(entry.path), status.st_size, 0.0)


def _packed(key: bytes, value: bytes) -> bytes:
    return HEADER.pack(MAGIC, FORMAT, len(key), len(value), _digest(key, value)) + key + value


def _unpacked(data: bytes, key: bytes) -> bytes | None:
    """The value, if the data is a whole entry of this very key."""
    if len(data) < HEADER.size:
        return None
    magic, version, key_size, size, digest = HEADER.unpack_from(data)
    if (magic, version) != (MAGIC, FORMAT) or len(data) != HEADER.size + key_size + size:
        return None
    value = data[HEADER.size + key_size :]
    found = data[HEADER.size : HEADER.size + key_size]
    return value if found == key and digest == _digest(key, value) else None


def _digest(key: bytes, value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=DIGEST, key=hashlib.blake2b(key).digest()).digest()
