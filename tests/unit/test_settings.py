"""Settings of the process: each is set once, by the environment or by configure, and a second value is an error."""

import contextlib
import dataclasses
import sys
import threading
from pathlib import Path

import pytest

from cudnn_flex_compile.config import PREFIX
from cudnn_flex_compile.settings import Settings, configure, forget, settings

pytestmark = pytest.mark.any_torch
OTHERS = {"cache": False, "cache_dir": "/elsewhere", "cache_mb": 7, "plan_cache_size": 4}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in dataclasses.fields(Settings):
        monkeypatch.delenv(PREFIX + field.name.upper(), raising=False)
    forget()


def test_nothing_set_is_the_defaults() -> None:
    assert settings() == configure() == Settings()


@pytest.mark.parametrize(("name", "value"), OTHERS.items())
def test_a_setting_is_set_once(name: str, value: object) -> None:
    assert getattr(configure(**{name: value}), name) == value
    assert configure(**{name: value}) == settings() == Settings(**{name: value})
    with pytest.raises(RuntimeError, match=f"^{name} is ") as error:
        configure(**{name: getattr(Settings(), name)})
    assert f"configure({name}={value!r})" in str(error.value)
    assert settings() == Settings(**{name: value})


def test_each_by_itself() -> None:
    for name, value in OTHERS.items():
        configure(**{name: value})
    assert settings() == Settings(**OTHERS)


def test_all_or_nothing() -> None:
    configure(cache_mb=3)
    with pytest.raises(RuntimeError):
        configure(plan_cache_size=5, cache_mb=4)
    with pytest.raises(ValueError, match="plan_cache_size=0"):
        configure(cache=False, plan_cache_size=0)
    assert settings() == Settings(cache_mb=3)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("cache", "0", False), ("cache_dir", "/elsewhere", "/elsewhere"), ("cache_mb", "7", 7),
     ("plan_cache_size", "4", 4)],
)  # fmt: skip
def test_what_the_environment_sets_stays(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object) -> None:
    monkeypatch.setenv(PREFIX + name.upper(), text)
    assert settings() == configure(**{name: value}) == Settings(**{name: value})
    with pytest.raises(RuntimeError, match=f"by the environment variable {PREFIX}{name.upper()}"):
        configure(**{name: getattr(Settings(), name)})


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings() == Settings()
    monkeypatch.setenv(PREFIX + "CACHE_MB", "7")
    assert settings() == Settings()
    forget()
    assert settings() == Settings(cache_mb=7)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [({"cache": 1}, TypeError, "expected bool"), ({"cache_dir": 3}, TypeError, "PathLike"),
     ({"cache_mb": 0}, ValueError, "1 and more"), ({"cache_mb": 2.5}, TypeError, "expected int"),
     ({"plan_cache_size": -4}, ValueError, "1 and more"), ({"plan_cache_size": True}, TypeError, "expected int"),
     ({"certify": "off"}, TypeError, "certify")],
)  # fmt: skip
def test_what_is_no_setting_is_an_error(given: dict[str, object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        configure(**given)
    assert settings() == Settings()


@pytest.mark.parametrize(("name", "text"), [("CACHE", "ture"), ("CACHE_MB", "many"), ("PLAN_CACHE_SIZE", "0")])
def test_a_wrong_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(PREFIX + name, text)
    for ask in (settings, configure):
        with pytest.raises(ValueError, match=f"(?i){name}='?{text}"):
            ask()


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The user's own, unless another is given; none where it is switched off."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if sys.platform == "linux":
        assert Settings().folder == tmp_path / "cudnn_flex_compile"
    assert Settings(cache_dir="~/plans").folder == tmp_path / "home" / "plans"
    assert Settings(cache=False, cache_dir="plans").folder is None
    assert configure(cache_dir=tmp_path).folder == tmp_path


def test_of_threads_that_set_one_differently_one_succeeds() -> None:
    barrier, set_to = threading.Barrier(8), []

    def work(number: int) -> None:
        barrier.wait()
        with contextlib.suppress(RuntimeError):
            set_to.append(configure(cache_mb=number).cache_mb)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set_to == [settings().cache_mb]
