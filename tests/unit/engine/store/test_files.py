"""The store: gives back what was written under just that key, or nothing, whatever happened to the files.

Knows nothing of plans.
"""

import contextlib
import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from cudnn_flex_compile.engine.store import files as module
from cudnn_flex_compile.engine.store.files import FORMAT, HEADER, MAGIC, Store

pytestmark = pytest.mark.any_torch
MIB = 2**20


def value_of(key: str, size: int = 3000) -> bytes:
    return random.Random(key).randbytes(size)


def filled(folder, count: int = 40) -> tuple[Store, list[str]]:
    store, keys = Store(folder, MIB), [f"key {i}" for i in range(count)]
    for key in keys:
        store.write(key, value_of(key))
    return store, keys


def files(folder):
    return sorted(p for p in folder.iterdir() if p.suffix == ".plan")


def child(code: str, *arguments: object) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)])


def test_what_was_written_is_read_by_another_store(tmp_path):
    _, keys = filled(tmp_path / "made" / "anew")
    other = Store(tmp_path / "made" / "anew", MIB)
    assert all(other.read(key) == value_of(key) for key in keys)
    assert other.read("key") is None
    assert len(files(tmp_path / "made" / "anew")) == len(keys)


def test_the_size(tmp_path):
    assert Store(tmp_path / "none", MIB).size() == (0, 0)
    store, keys = filled(tmp_path)
    assert store.size() == (len(keys), sum(p.stat().st_size for p in files(tmp_path)))


def test_the_last_value_counts(tmp_path):
    store = Store(tmp_path, MIB)
    for value in (b"first", b"", b"second" * 1000):
        store.write("key", value)
        assert store.read("key") == value
    assert len(files(tmp_path)) == 1


def test_nothing_is_made_by_reading(tmp_path):
    assert Store(tmp_path / "none", MIB).read("key") is None
    assert not (tmp_path / "none").exists()


def flip(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


DAMAGES = {
    "a flipped bit": flip,
    "a truncated file": lambda data, draw: data[: draw.randrange(len(data))],
    "an empty file": lambda data, draw: b"",
    "zeros": lambda data, draw: bytes(len(data)),
    "something longer": lambda data, draw: data + b"\0",
    "something foreign": lambda data, draw: draw.randbytes(len(data)),
    "half of another": lambda data, draw: data[: len(data) // 2] + draw.randbytes(len(data) - len(data) // 2),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_every_tenth_file_is_damaged(tmp_path, damage):
    store, keys = filled(tmp_path, 100)
    draw, damaged = random.Random(0), set(files(tmp_path)[::10])
    for path in damaged:
        path.write_bytes(damage(path.read_bytes(), draw))
    for key in keys:
        expected = None if store._path(key) in damaged else value_of(key)
        assert store.read(key) == expected
        if expected is None:
            store.write(key, value_of(key))
            assert store.read(key) == value_of(key), "a damaged entry is written anew"


def test_any_flipped_bit_is_a_miss(tmp_path):
    store = Store(tmp_path, MIB)
    store.write("key", b"value")
    path = store._path("key")
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        path.write_bytes(good[: bit // 8] + bytes([good[bit // 8] ^ (1 << bit % 8)]) + good[bit // 8 + 1 :])
        assert store.read("key") is None
    path.write_bytes(good)
    assert store.read("key") == b"value"


@pytest.mark.parametrize(("magic", "version"), [(MAGIC, FORMAT + 1), (MAGIC, 0), (b"cudnnfly", FORMAT)])
def test_another_format_is_a_miss(tmp_path, monkeypatch, magic, version):
    """Also where all else fits: this is how an entry of a later version would look."""
    store = Store(tmp_path, MIB)
    with monkeypatch.context() as later:
        later.setattr(module, "MAGIC", magic)
        later.setattr(module, "FORMAT", version)
        store.write("key", b"value")
        assert store.read("key") == b"value"
    assert store.read("key") is None


def test_an_entry_of_another_key_is_a_miss(tmp_path):
    """As after a collision of the names of files, or a file that somebody renamed."""
    store, _ = filled(tmp_path, 2)
    os.replace(store._path("key 0"), store._path("key 1"))
    assert store.read("key 1") is None
    assert store.read("key 0") is None


def test_the_key_is_in_the_entry(tmp_path):
    """Word for word: a digest alone would have the reader believe in it."""
    store = Store(tmp_path, MIB)
    store.write("a long key\nof two lines", b"value")
    data = store._path("a long key\nof two lines").read_bytes()
    assert data[HEADER.size :] == b"a long key\nof two linesvalue"
    assert hashlib.blake2b(b"value", digest_size=32).digest() not in data, "the digest covers the key, too"


def test_the_least_recently_used_go_first(tmp_path):
    store = Store(tmp_path, 20_000)
    for i in range(6):
        store.write(f"key {i}", value_of(str(i)))
        os.utime(store._path(f"key {i}"), (1000 + i, 1000 + i))
    assert store.read("key 0") == value_of("0")
    store.write("key 6", value_of("6"))
    left = {i for i in range(7) if store.read(f"key {i}")}
    assert {0, 5, 6} <= left
    assert left == {0, *range(min(left - {0}), 7)}
    assert 1 not in left


def test_the_bound_holds_at_every_write(tmp_path):
    bound, draw = 200_000, random.Random(0)
    store = Store(tmp_path, bound)
    for i in range(300):
        key = f"key {draw.randrange(80)}"
        store.write(key, value_of(str(i), draw.randrange(1, 12_000)))
        assert store.read(key) == value_of(str(i), len(store.read(key) or b""))
        assert sum(p.stat().st_size for p in files(tmp_path)) <= bound
    assert sum(p.stat().st_size for p in files(tmp_path)) > bound / 2


def test_what_is_larger_than_the_bound_is_not_kept(tmp_path):
    store = Store(tmp_path, 10_000)
    store.write("small", b"value")
    store.write("large", bytes(10_000))
    assert store.read("large") is None
    assert store.read("small") == b"value"


def test_what_dead_writers_left_goes(tmp_path):
    store = Store(tmp_path, 30_000)
    old, new = tmp_path / "old.part", tmp_path / "new.part"
    for path in (old, new):
        path.write_bytes(bytes(20_000))
    os.utime(old, (time.time() - 7200,) * 2)
    for i in range(4):
        store.write(f"key {i}", value_of(str(i)))
    assert not old.exists()
    assert new.exists(), "somebody may be writing it"
    assert all(store.read(f"key {i}") for i in range(4))


def test_other_files_are_left_alone(tmp_path):
    note = tmp_path / "note.txt"
    note.write_bytes(bytes(50_000))
    store = Store(tmp_path, 20_000)
    for i in range(20):
        store.write(f"key {i}", value_of(str(i)))
    assert note.exists()


@pytest.mark.parametrize("obstacle", ["a file", "below a file", "no room"])
def test_a_folder_that_cannot_be_written(tmp_path, caplog, monkeypatch, obstacle):
    """Root may write anywhere: what is in the way is a file, or a full disk."""
    (tmp_path / "file").write_bytes(b"")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "folder"}.get(obstacle, tmp_path)
    if obstacle == "no room":
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    store = Store(folder, MIB)
    with caplog.at_level(logging.WARNING, "cudnn_flex_compile"):
        for i in range(3):
            store.write(f"key {i}", b"value")
            assert store.read(f"key {i}") is None
    assert [r.message.split(":")[1] for r in caplog.records] == [" plans are not kept beyond this process"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_only_read(tmp_path):
    store, keys = filled(tmp_path)
    tmp_path.chmod(0o500)
    try:
        store.write("new", b"value")
        assert store.read("new") is None
        assert all(store.read(key) == value_of(key) for key in keys)
    finally:
        tmp_path.chmod(0o700)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from cudnn_flex_compile.engine.store.files import Store

    store, when = Store(Path(sys.argv[1]), 2**20), sys.argv[2]
    store.write("before", b"value")

    class Dying:
        def __init__(self, number, mode):
            self.number = number
        def __enter__(self):
            return self
        def __exit__(self, *_):
            pass
        def write(self, data):
            os.write(self.number, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    if when == "in the midst":
        os.fdopen = Dying
    else:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    store.write("before", b"a newer value" * 1000)
"""


@pytest.mark.parametrize("when", ["in the midst", "before it is in place"])
def test_a_process_killed_while_it_writes(tmp_path, when):
    """The entry that was there stays; what it left is read by nobody, and written over by nobody."""
    process = child(KILLED, tmp_path, when)
    assert process.wait(timeout=120) == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.part"))) == 1
    store = Store(tmp_path, MIB)
    assert store.read("before") == b"value"
    store.write("before", b"again")
    assert store.read("before") == b"again"


SHARED = """
    import random, sys
    from pathlib import Path
    from cudnn_flex_compile.engine.store.files import Store

    folder, me, bound, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    store, draw, hits = Store(folder, bound), random.Random(me), 0
    value = lambda key, writer: f"{key} by {writer} ".encode() * 300
    for _ in range(rounds):
        key = f"key {draw.randrange(60)}"
        found = store.read(key)
        if found is None or draw.random() < 0.3:
            store.write(key, value(key, me))
        if found is not None:
            hits += 1
            assert any(found == value(key, writer) for writer in range(4)), f"{key}: {found[:60]}"
    assert hits, "nothing was ever found"
"""


@pytest.mark.parametrize(("bound", "lost"), [(MIB, False), (100_000, True)], ids=["all fit", "evicting"])
def test_four_processes_at_once_on_an_empty_folder(tmp_path, bound, lost):
    """Whole values of just that key, whoever wrote them; all there in the end, if they fit."""
    folder = tmp_path / "cache"
    workers = [child(SHARED, folder, i, bound, 1500) for i in range(4)]
    assert [worker.wait(timeout=300) for worker in workers] == [0] * 4
    assert not list(folder.glob("*.part"))
    store = Store(folder, bound)
    found = [store.read(f"key {i}") for i in range(60)]
    assert all(found) is not lost
    total = sum(p.stat().st_size for p in files(folder))
    assert total <= bound * (1 + 4 / module.SHARE)


def test_readers_do_not_wait_for_an_eviction(tmp_path):
    """Nor do writers: the lock is held here for good."""
    store = Store(tmp_path, 20_000)
    store.write("key", b"value")
    with module.FileLock(tmp_path / "evict.lock"):
        begun = time.monotonic()
        for i in range(20):
            store.write(f"key {i}", value_of(str(i)))
            assert store.read(f"key {i}") == value_of(str(i))
        assert time.monotonic() - begun < 20
    with contextlib.suppress(FileNotFoundError):
        assert store.read("key") == b"value"
