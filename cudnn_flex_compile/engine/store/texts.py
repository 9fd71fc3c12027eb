"""Keeps measured texts beyond the process, such as times, each under a key that has everything that it depends on."""

from cudnn_flex_compile.engine.state import engine


def recall_text(key: str) -> str | None:
    """The text that keep_text kept under this key, in this process or in another."""
    store = engine.store
    data = None if store is None else store.read(key)
    return None if data is None else data.decode()


def keep_text(key: str, value: str) -> None:
    store = engine.store
    if store is not None:
        store.write(key, value.encode())
