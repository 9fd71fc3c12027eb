"""Options: what is unknown or wrong is said with what is valid, and the environment stands behind what is given."""

import dataclasses
import itertools

import pytest

from cudnn_flex_compile.config import CERTIFY, FORCED, GRAPHS, PREFIX, Options, Policy, options_from, policy_from
from cudnn_flex_compile.settings import Settings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in dataclasses.fields(Options):
        monkeypatch.delenv(PREFIX + field.name.upper(), raising=False)


def test_nothing_given_is_the_defaults() -> None:
    assert options_from(None) == options_from({}) == Options()


def test_what_is_given_is_taken() -> None:
    options = options_from({"inner_backend": "aot_eager", "certify": "off", "bias_budget_mb": 3, "verbose": True})
    assert options == Options(inner_backend="aot_eager", certify="off", bias_budget_mb=3, verbose=True)


def test_unknown_keys_are_all_named_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="unknown option") as error:
        options_from({"zzz": 1, "verbos": True, "verbose": True})
    message = str(error.value)
    assert "'verbos', 'zzz'" in message
    assert all(field.name in message for field in dataclasses.fields(Options))


@pytest.mark.parametrize(
    ("given", "valid"),
    [({"certify": "twice"}, "'once', 'always', 'off'"), ({"mode": "fast"}, "'max-autotune'"),
     ({"certify": None}, "'once'"), ({"bias_budget_mb": -4}, "0 and more")],
)  # fmt: skip
def test_wrong_values_are_named_with_the_valid_ones(given: dict[str, object], valid: str) -> None:
    with pytest.raises(ValueError, match="valid values") as error:
        options_from(given)
    name, value = next(iter(given.items()))
    assert f"{name}={value!r}" in str(error.value)
    assert valid in str(error.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"bias_budget_mb": "256"}, "int"), ({"bias_budget_mb": 2.5}, "int"), ({"bias_budget_mb": True}, "int"),
     ({"verbose": 1}, "bool"), ({"verbose": "yes"}, "bool"), ({"inner_backend": None}, "str"),
     ({"inner_options": 3}, "Mapping"),
     ({"inner_options": [("a", 1)]}, "Mapping")],
)  # fmt: skip
def test_wrong_types_are_named_with_the_expected_one(given: dict[str, object], expected: str) -> None:
    with pytest.raises(TypeError, match=f"expected {expected}") as error:
        options_from(given)
    assert next(iter(given)) in str(error.value)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Settings)])
def test_what_is_the_processs_is_no_option(name: str) -> None:
    """The error says where it is set."""
    value = getattr(Settings(), name)
    with pytest.raises(ValueError, match="whole process, not for one compile") as error:
        options_from({name: value, "verbose": True})
    assert f"configure({name}={value!r})" in str(error.value)
    assert PREFIX + name.upper() in str(error.value)


POLICIES = [Policy(*fields) for fields in itertools.product(CERTIFY, (False, True), (False, True), ("", *GRAPHS))]


def test_a_policys_text_is_its_own() -> None:
    assert Policy().text == ""
    assert len({policy.text for policy in POLICIES}) == len(POLICIES)
    assert [policy_from(policy.text) for policy in POLICIES] == POLICIES
    assert Options(certify="always", autotune=True, replay=False).policy == Policy("always", True, False)


def test_a_forced_strategy_is_of_the_policy_where_it_is_of_a_plan() -> None:
    by_plans = {name: Options(strategy=name).policy.strategy for name in FORCED}
    assert by_plans == {name: name if name in GRAPHS else "" for name in FORCED}
    with pytest.raises(ValueError, match=r"valid values: None, 'inductor', 'tile_lists', .*, 'graphs', 'native'"):
        options_from({"strategy": "fast"})


@pytest.mark.parametrize(
    "text", ["once", "certify=once", "certify=", "certify=maybe", "replay=True", "autotune=False", "replay=False ", " ",
             "replay=False certify=off", "certify=off certify=off", "certify=off certify=always"],
)  # fmt: skip
def test_a_second_spelling_of_a_policy_is_an_error(text: str) -> None:
    """It would be a second key for the same plans."""
    with pytest.raises(ValueError, match="Policy"):
        policy_from(text)


def test_a_former_name_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options_from({"intervals": False}) == Options(tile_lists=False)
    monkeypatch.setenv("CUDNN_FLEX_INTERVALS", "0")
    assert options_from(None) == Options(tile_lists=False)
    monkeypatch.setenv("CUDNN_FLEX_TILE_LISTS", "1")
    assert options_from(None) == Options(), "the present name goes first"
    with pytest.raises(ValueError, match="'intervals' is now 'tile_lists', and both are given"):
        options_from({"intervals": False, "tile_lists": False})


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
     ("bias_budget_mb", "17", 17), ("replay", "no", False),
     ("verbose", "1", True), ("verbose", "TRUE", True), ("verbose", "yes", True),
     ("verbose", "on", True), ("verbose", "0", False), ("verbose", "off", False), ("verbose", "", False)],
)  # fmt: skip
def test_environment_variables(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object) -> None:
    monkeypatch.setenv(PREFIX + name.upper(), text)
    assert getattr(options_from(None), name) == value


def test_options_go_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "BIAS_BUDGET_MB", "17")
    monkeypatch.setenv(PREFIX + "CERTIFY", "off")
    options = options_from({"bias_budget_mb": 5})
    assert (options.bias_budget_mb, options.certify) == (5, "off")
    monkeypatch.setenv(PREFIX + "MODE", "default")
    assert options_from(None, "max-autotune").mode == "max-autotune"


def test_a_wrong_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "BIAS_BUDGET_MB", "many")
    with pytest.raises(ValueError, match="CUDNN_FLEX_BIAS_BUDGET_MB='many'"):
        options_from(None)


def test_wrong_choices_in_the_environment_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "CERTIFY", "maybe")
    with pytest.raises(ValueError, match="certify='maybe'"):
        options_from(None)


def test_a_wrong_switch_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "VERBOSE", "ture")
    with pytest.raises(ValueError, match="CUDNN_FLEX_VERBOSE='ture'"):
        options_from(None)
