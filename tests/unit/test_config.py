"""Options: what is unknown or wrong is said with what is valid, and the environment stands behind what is given."""

import dataclasses
import sys
from pathlib import Path

import pytest

from cudnn_flex_compile.config import PREFIX, Options, options_from


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in dataclasses.fields(Options):
        monkeypatch.delenv(PREFIX + field.name.upper(), raising=False)


def test_nothing_given_is_the_defaults() -> None:
    assert options_from(None) == options_from({}) == Options()


def test_what_is_given_is_taken() -> None:
    options = options_from({"inner_backend": "aot_eager", "certify": "off", "plan_cache_size": 3, "verbose": True})
    assert options == Options(inner_backend="aot_eager", certify="off", plan_cache_size=3, verbose=True)


def test_unknown_keys_are_all_named_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="unknown option") as error:
        options_from({"zzz": 1, "verbos": True, "verbose": True})
    message = str(error.value)
    assert "'verbos', 'zzz'" in message
    assert all(field.name in message for field in dataclasses.fields(Options))


@pytest.mark.parametrize(
    ("given", "valid"),
    [({"certify": "twice"}, "'once', 'always', 'off'"), ({"mode": "fast"}, "'max-autotune'"),
     ({"plan_cache_size": 0}, "1 and more"), ({"cache_mb": 0}, "1 and more"),
     ({"certify": None}, "'once'"), ({"plan_cache_size": -4}, "1 and more")],
)  # fmt: skip
def test_wrong_values_are_named_with_the_valid_ones(given: dict[str, object], valid: str) -> None:
    with pytest.raises(ValueError, match="valid values") as error:
        options_from(given)
    name, value = next(iter(given.items()))
    assert f"{name}={value!r}" in str(error.value)
    assert valid in str(error.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"plan_cache_size": "256"}, "int"), ({"plan_cache_size": 2.5}, "int"), ({"plan_cache_size": True}, "int"),
     ({"verbose": 1}, "bool"), ({"verbose": "yes"}, "bool"), ({"inner_backend": None}, "str"),
     ({"inner_options": 3}, "Mapping"),
     ({"inner_options": [("a", 1)]}, "Mapping")],
)  # fmt: skip
def test_wrong_types_are_named_with_the_expected_one(given: dict[str, object], expected: str) -> None:
    with pytest.raises(TypeError, match=f"expected {expected}") as error:
        options_from(given)
    assert next(iter(given)) in str(error.value)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The user's own, unless another is given; none where it is switched off."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if sys.platform == "linux":
        assert options_from({}).cache_folder == tmp_path / "cudnn_flex_compile"
    assert options_from({"cache_dir": "~/plans"}).cache_folder == tmp_path / "home" / "plans"
    assert options_from({"cache": False, "cache_dir": "plans"}).cache_folder is None
    monkeypatch.setenv("CUDNN_FLEX_CACHE_DIR", str(tmp_path / "there"))
    assert options_from({}).cache_folder == tmp_path / "there"
    monkeypatch.setenv("CUDNN_FLEX_CACHE", "0")
    assert options_from({}).cache_folder is None


def test_options_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().verbose = True  # pyright: ignore[reportAttributeAccessIssue]


def test_the_mode_of_torch_compile_is_a_default() -> None:
    assert options_from(None, "max-autotune").mode == "max-autotune"
    assert options_from({"mode": "default"}, "max-autotune").mode == "default"
    with pytest.raises(ValueError, match="mode='fast'"):
        options_from(None, "fast")


def test_the_given_mapping_is_not_changed() -> None:
    given = {"verbose": True}
    options_from(given, "default")
    assert given == {"verbose": True}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("inner_backend", "eager", "eager"), ("mode", "reduce-overhead", "reduce-overhead"), ("certify", "off", "off"),
     ("certify", "always", "always"),
     ("plan_cache_size", "17", 17), ("verbose", "1", True), ("verbose", "TRUE", True), ("verbose", "yes", True),
     ("verbose", "on", True), ("verbose", "0", False), ("verbose", "off", False), ("verbose", "", False)],
)  # fmt: skip
def test_environment_variables(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object) -> None:
    monkeypatch.setenv(PREFIX + name.upper(), text)
    assert getattr(options_from(None), name) == value


def test_options_go_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "PLAN_CACHE_SIZE", "17")
    monkeypatch.setenv(PREFIX + "CERTIFY", "off")
    options = options_from({"plan_cache_size": 5})
    assert (options.plan_cache_size, options.certify) == (5, "off")
    monkeypatch.setenv(PREFIX + "MODE", "default")
    assert options_from(None, "max-autotune").mode == "max-autotune"


def test_a_wrong_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "PLAN_CACHE_SIZE", "many")
    with pytest.raises(ValueError, match="CUDNN_FLEX_PLAN_CACHE_SIZE='many'"):
        options_from(None)


def test_wrong_choices_in_the_environment_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "CERTIFY", "maybe")
    with pytest.raises(ValueError, match="certify='maybe'"):
        options_from(None)


def test_a_wrong_switch_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "VERBOSE", "ture")
    with pytest.raises(ValueError, match="CUDNN_FLEX_VERBOSE='ture'"):
        options_from(None)
