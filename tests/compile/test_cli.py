"""The command cudnn-flex: what it prints, and its exit codes."""

import json
import subprocess
import sys

import pytest
import torch

from cudnn_flex_compile import cli
from cudnn_flex_compile.engine import selftest, versions
from cudnn_flex_compile.reasons import Code, Reason

SCRIPT = """
import sys
import torch
from torch.nn.attention.flex_attention import flex_attention

def layer(x):
    return flex_attention(x, x, x)

print("given", sys.argv, __name__)
if sys.argv[1] != "none":
    x = torch.zeros(1, 1, 128, 64, dtype=getattr(torch, sys.argv[1]))
    torch.compile(layer, backend="cudnn_flex", options={"inner_backend": "eager"})(x)
if sys.argv[2:] == ["raise"]:
    raise RuntimeError("from the script")
if sys.argv[2:]:
    sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_explains_a_script(script, capsys):
    assert cli.main(["explain", script, "bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert "__main__" in shown
    assert "1 lowered to cuDNN, 0 kept" in shown
    assert "script.py:7 layer" in shown


def test_explains_as_json_and_passes_options_on(script, capsys):
    before = list(sys.argv), list(sys.path)
    assert cli.main(["explain", "--json", script, "float32", "0"]) == 0
    assert (sys.argv, sys.path) == before
    shown = capsys.readouterr()
    assert "given" in shown.err
    found = json.loads(shown.out)
    assert (found["lowered"], found["kept"], found["exit_code"]) == (0, 1, 0)
    assert found["calls"][0]["reason"]["code"] == "DTYPE"


MASKED = SCRIPT.replace("(x, x, x)", "(x, x, x, lambda s, b, h, q, kv: torch.where(q >= kv, s, -float('inf')))")


@pytest.mark.parametrize(("source", "said"), [(MASKED, "1 masks drawn"), (SCRIPT, "no call has a mask")])
def test_draws_the_masks(source, said, tmp_path, capsys):
    (tmp_path / "script.py").write_text(source)
    assert cli.main(["explain", "--plot", str(tmp_path / "masks.png"), str(tmp_path / "script.py"), "bfloat16"]) == 0
    assert said in capsys.readouterr().err
    assert (tmp_path / "masks.png").exists() == (source == MASKED)


def test_says_why_nothing_is_drawn(tmp_path, capsys, monkeypatch):
    (tmp_path / "script.py").write_text(MASKED)
    assert cli.main(["explain", "--plot", str(tmp_path / "no" / "x.png"), str(tmp_path / "script.py"), "bfloat16"]) == 1
    shown = capsys.readouterr()
    assert "1 lowered" in shown.out
    assert "cannot write" in shown.err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["explain", "--plot", "masks.png", str(tmp_path / "script.py"), "bfloat16"])
    assert stopped.value.code == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_passes_the_exit_code_on(script, capsys):
    assert cli.main(["explain", script, "bfloat16", "7"]) == 7
    assert "1 lowered" in capsys.readouterr().out


def test_shows_what_was_compiled_before_an_error(script, capsys):
    assert cli.main(["explain", script, "bfloat16", "raise"]) == 1
    shown = capsys.readouterr()
    assert "1 lowered" in shown.out
    assert "from the script" in shown.err


def test_says_that_nothing_was_compiled(script, capsys):
    assert cli.main(["explain", script, "none"]) == 1
    assert "pass it to torch.compile" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "missing.py"], "'missing.py' is no file; give the path"),
        (["explain"], "script"),
        (["explian"], "choose from"),
        ([], "doctor | explain"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_doctor_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(versions, "cudnn_missing", lambda: "ImportError: gone")
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert "cannot be loaded: ImportError: gone" in shown
    assert "No plan can run here: DEVICE" in shown


RIGHT = selftest.Outcome("causal", ("native", "native"), None, 1.25)
WRONG = selftest.Outcome("soft cap", ("chained",), Reason(Code.CERTIFICATION, "dQ is off by 0.3"), 2.0)


@pytest.fixture
def gpus(monkeypatch):
    """Makes the machine seem to have GPUs; a function of why each is unusable, and of what the self-test finds."""

    def pretend(reasons, outcomes):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(reasons))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
        monkeypatch.setattr(versions, "cudnn_missing", lambda: None)
        monkeypatch.setattr(versions, "cudnn_version", lambda: 91900)
        monkeypatch.setattr(versions, "unusable_device", reasons.__getitem__)
        monkeypatch.setattr(selftest, "run", lambda device: iter(outcomes))

    return pretend


OLD = Reason(Code.CUDNN_OLD, "9.1")


@pytest.mark.parametrize(
    ("reasons", "outcomes", "code"),
    [([None], [RIGHT], 0), ([OLD, None], [RIGHT], 0), ([OLD], [RIGHT], 1), ([None], [RIGHT, WRONG], 1)],
)
def test_doctor_with_gpus(reasons, outcomes, code, gpus, capsys):
    gpus(reasons, outcomes)
    assert cli.main(["doctor", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["can_run"] == (None in reasons)
    assert found["cuDNN"] == "9.19.0"
    assert found["devices"][0] == "0: a GPU, compute capability 9.0"
    assert (found["reason"] or {}).get("code") == (None if None in reasons else "CUDNN_OLD")
    assert [test["name"] for test in found["self_test"]] == [o.name for o in outcomes if None in reasons]
    assert [(t["reason"] or {}).get("code") for t in found["self_test"]][1:] == ["CERTIFICATION"] * (len(outcomes) - 1)


@pytest.mark.parametrize(("outcomes", "code"), [([RIGHT], 0), ([RIGHT, WRONG], 1)])
def test_doctor_shows_the_self_test(outcomes, code, gpus, capsys):
    gpus([None], outcomes)
    assert cli.main(["doctor"]) == code
    shown = capsys.readouterr().out
    assert "compute capability 9.0" in shown
    assert "native, native" in shown
    assert ("Plans run right here" in shown) == (code == 0)
    assert ("FAILED: CERTIFICATION: dQ is off by 0.3" in " ".join(shown.split())) == (code == 1)
    assert ("3.2 s" if code else "1.2 s") in shown


def test_starts_without_torch():
    code = "import sys, cudnn_flex_compile.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
