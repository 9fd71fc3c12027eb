"""install(): what Inductor compiles is lowered, whoever compiles it; and nothing else changes."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from cudnn_flex_compile import cli, collect, explain, inductor_seam, install, uninstall
from cudnn_flex_compile.config import CHOICES, Options, Policy, options_from
from cudnn_flex_compile.inductor_pass import LowerFlexAttention
from cudnn_flex_compile.installation import OTHERS, install_if_asked
from cudnn_flex_compile.kernels import cpu

S, D = 128, 16


def causal(b, h, q, kv):
    return q >= kv


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)  # trains on the CPU
    yield
    uninstall()


@pytest.fixture
def ran(monkeypatch):
    """The forwards of our op that ran."""
    calls, forward = [], cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    return calls


def qkv(seed=0):
    torch.manual_seed(seed)
    return [torch.randn(1, 2, S, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def gradients(call, tensors):
    return torch.autograd.grad(call(*tensors).float().square().sum(), tensors)


def assert_same(found, wanted):
    for mine, theirs in zip(found, wanted, strict=True):
        assert float((mine.float() - theirs.float()).norm() / theirs.float().norm()) < 0.02


def mask():
    return create_block_mask(causal, None, None, S, S, device="cpu")


def test_flex_attention_alone(ran):
    given, blocks = qkv(), mask()
    wanted = gradients(lambda q, k, v: flex_attention(q, k, v, block_mask=blocks), given)
    with install(lower="always"), collect() as report:
        alone = torch.compile(flex_attention)
        found = gradients(lambda q, k, v: alone(q, k, v, block_mask=blocks), given)
    report.assert_all_lowered()
    assert "test_install.py" in report.calls[0].source
    assert ran
    assert_same(found, wanted)


def test_block_by_block(ran):
    class Block(torch.nn.Module):
        def forward(self, x, blocks):
            return x + flex_attention(x, x, x, block_mask=blocks)

    given, blocks, layers = qkv()[:1], mask(), [Block() for _ in range(3)]

    def model(x):
        for layer in layers:
            x = layer(x, blocks)
        return x

    wanted = gradients(model, given)
    for layer in layers:
        layer.compile(fullgraph=True)
    with install(lower="always"), collect() as report:
        found = gradients(model, given)
    assert len(report.lowered) == 1  # Dynamo compiles the code of a block once
    assert len(ran) == 3
    assert_same(found, wanted)


def test_checkpointed_region():
    def block(x):
        return flex_attention(x * 2, x, x)

    given = qkv()[:1]
    with install(lower="always"), collect() as report:
        compiled = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False).sin())
        found = gradients(compiled, given)
    assert (len(report.lowered), len(report.kept)) == (1, 0)
    assert_same(found, gradients(lambda x: block(x).sin(), given))


def test_behind_a_disabled_function(ran):
    compiled = torch.compile(flex_attention)

    @torch.compiler.disable
    def attention(x):
        return compiled(x, x, x)

    with install(lower="always"), collect() as report, torch.no_grad():
        torch.compile(lambda x: attention(x * 2) + 1)(qkv()[0])
    assert (len(report.lowered), len(ran)) == (1, 1)


def test_dynamic_lengths(ran):
    compiled = torch.compile(lambda x: flex_attention(x * 2, x, x, lambda s, b, h, q, kv: s * 0.5), dynamic=None)
    with install(lower="always"), collect() as report, torch.no_grad():
        for length in (64, 96, 128, 160):
            x = torch.randn(1, 2, length, D, dtype=torch.bfloat16)
            wanted = flex_attention(x * 2, x, x, lambda s, b, h, q, kv: s * 0.5)
            torch.testing.assert_close(compiled(x), wanted, rtol=0.02, atol=0.02)
    assert len(report.lowered) == 2  # static, then symbolic
    assert len(ran) == 4


def test_mode_and_options_of_the_users_compile_stay(monkeypatch):
    seen = []
    monkeypatch.setattr(
        LowerFlexAttention, "__call__", lambda self, graph: seen.append(inductor_config.epilogue_fusion)
    )
    with install(lower="always"), torch.no_grad():
        torch.compile(lambda x: x + 1, options={"epilogue_fusion": False})(torch.ones(3))
    assert seen == [False]


class Theirs(CustomGraphPass):
    def __init__(self, name):
        self.name, self.graphs = name, []

    def __call__(self, graph):
        self.graphs.append([str(node.target) for node in graph.nodes])

    def uuid(self):
        return self.name


def test_a_pass_of_the_user_runs_first():
    theirs = Theirs("theirs")
    with inductor_config.patch(pre_grad_custom_pass=theirs):
        with install(lower="always"), collect() as report, torch.no_grad():
            torch.compile(lambda x: flex_attention(x, x, x) * 2)(qkv()[0])
        assert inductor_config.pre_grad_custom_pass is theirs
    assert any("flex_attention" in names for names in theirs.graphs)
    assert len(report.lowered) == 1


def uuid(**options):
    with install(**options):
        return inductor_seam.installed().uuid()


def test_the_uuid_says_all_that_the_graph_depends_on(monkeypatch):
    plain = uuid()
    assert plain == uuid()
    for field in dataclasses.fields(Options):
        if field.name not in OTHERS:
            assert uuid(**{field.name: other_value(field.name, {})}) != plain, field.name
    with inductor_config.patch(pre_grad_custom_pass=Theirs("theirs")):
        assert uuid() != plain
    with inductor_config.patch(pre_grad_custom_pass=lambda graph: None):
        assert uuid() is None
    monkeypatch.setattr("cudnn_flex_compile.inductor_pass.code_digest", lambda: "other code")
    assert uuid() != plain


@pytest.fixture
def lowered_graphs(monkeypatch):
    """The graphs that our pass leaves to Inductor, as text."""
    texts, run = [], LowerFlexAttention.__call__

    def recorded(self, graph):
        run(self, graph)
        texts.append(str(graph))

    monkeypatch.setattr(LowerFlexAttention, "__call__", recorded)
    return texts


def test_a_cache_hit_is_of_the_same_graph(lowered_graphs, tmp_path, monkeypatch):
    """For each option: what Inductor has stored serves a compile with another value only if nothing of it differs, and
    what says how plans are found is in the graph.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    names = [f.name for f in dataclasses.fields(Options) if f.name not in OTHERS]
    of_policy = {f.name for f in dataclasses.fields(Policy)}
    assert of_policy <= set(names)

    def compiled(**options):
        """Whether it was a hit, and the graph."""
        torch._dynamo.reset()
        counters.clear()
        lowered_graphs.clear()
        with install(**options), torch.no_grad():
            torch.compile(flex_attention)(*[torch.ones(1, 1, S, D, dtype=torch.bfloat16)] * 3)
        return bool(counters["inductor"]["fxgraph_cache_hit"]), lowered_graphs[-1]

    always = {"lower": "always"}
    assert not compiled(**always)[0]
    hit, plain = compiled(**always)
    assert hit
    seen = {plain}
    for name in names:
        hit, text = compiled(**always | {name: other_value(name, always)})
        assert not hit or text in seen, name
        assert name not in of_policy or text not in seen, name
        seen.add(text)


def other_value(name, given):
    """One that the option does not have."""
    value = {**dataclasses.asdict(options_from({})), **given}[name]
    if isinstance(value, bool):
        return not value
    if name in CHOICES:
        return next(choice for choice in CHOICES[name] if choice not in (None, value))
    return value + 1


def test_caches_of_inductor_stay_right(ran, tmp_path, monkeypatch):
    """The same function is compiled stock, lowered, and stock again, each with the caches of those before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def call():
        torch._dynamo.reset()
        ran.clear()
        with torch.no_grad():
            torch.compile(lambda x: flex_attention(x, x, x).sin())(torch.ones(1, 1, S, D, dtype=torch.bfloat16))
        return len(ran)

    def lowered(**options):
        with install(**options):
            return call()

    always = {"lower": "always"}
    assert [lowered(**always), lowered(bias_budget_mb=1, **always), lowered(**always)] == [1, 1, 1]
    with inductor_config.patch(pre_grad_custom_pass=None):
        assert "cudnn_flex" not in str(torch._inductor.config.pre_grad_custom_pass)
    assert lowered(**always) == 1


def test_kept_calls_of_the_backend_are_kept(ran):
    x = torch.randn(1, 2, S, D)  # float32 is kept
    options = {"inner_backend": "eager"}
    with install(lower="always"), collect() as report, torch.no_grad():
        torch.compile(lambda x: flex_attention(x, x, x) * 2, backend="cudnn_flex", options=options)(x)
        assert inductor_seam.installed() is not None
    assert [call.reason.code.name for call in report.calls] == ["DTYPE"]


def test_install_twice():
    install(lower="always")
    install(lower="always")
    with pytest.raises(RuntimeError, match=r"installed with .*lower='always'.*uninstall"):
        install(lower="when_faster")
    uninstall()
    assert inductor_seam.installed() is None
    uninstall()


@pytest.mark.parametrize("name", OTHERS)
def test_refuses_what_belongs_to_the_users_compile(name):
    with pytest.raises(ValueError, match=f"{name} is an option of the torch.compile"):
        install(**{name: "inductor"})
    with pytest.raises(ValueError, match="unknown option 'lowre'"):
        install(lowre="always")
    assert inductor_seam.installed() is None


def test_uninstalling_restores(monkeypatch):
    before = inductor_config.pre_grad_custom_pass, getattr(inductor_config, inductor_seam.TIMING, None)
    with install():
        pass
    assert (inductor_config.pre_grad_custom_pass, getattr(inductor_config, inductor_seam.TIMING, None)) == before


def test_environment(monkeypatch, caplog):
    monkeypatch.delenv("CUDNN_FLEX_INSTALL", raising=False)
    install_if_asked()
    assert inductor_seam.installed() is None
    monkeypatch.setenv("CUDNN_FLEX_INSTALL", "yes please")
    install_if_asked()
    assert "valid: 1" in caplog.text
    monkeypatch.setenv("CUDNN_FLEX_INSTALL", "1")
    install_if_asked()
    assert inductor_seam.installed() is not None


def test_importing_torch_installs_where_the_environment_says_so():
    (found,) = [e for e in metadata.entry_points(group="torch.backends") if e.name == "cudnn_flex_compile"]
    assert found.value == "cudnn_flex_compile.installation:install_if_asked"
    code = "import torch; from cudnn_flex_compile import inductor_seam; print(inductor_seam.installed() is not None)"
    for asked in ("1", "0"):
        environment = {**os.environ, "CUDNN_FLEX_INSTALL": asked}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == str(asked == "1"), done.stderr


SCRIPT = """
import sys
import torch
from torch.nn.attention.flex_attention import flex_attention

x = torch.zeros(1, 1, 128, 16, dtype=torch.bfloat16)
compiled = torch.compile(flex_attention)
eager = torch.compiler.disable(lambda: flex_attention(x, x, x))
compiled(x, x, x)
eager()
eager()
print("given", sys.argv[1:])
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_explain_lists_what_runs_elsewhere(script, capsys):
    assert cli.main(["explain", "--json", script]) == 1  # none was compiled with the backend
    shown = json.loads(capsys.readouterr().out)["outside"]
    assert [(call["ran"], call["times"]) for call in shown] == [
        ("compiled by Inductor alone", 1),
        ("not compiled, or by a backend without a kernel for it", 2),
    ]
    assert all("script.py" in call["source"] and "install()" in call["remedy"] for call in shown)
    torch._dynamo.reset()
    assert cli.main(["explain", script]) == 1
    assert "script.py:9 <module>" in capsys.readouterr().out


def test_explain_of_a_model_lists_what_runs_elsewhere():
    x = torch.zeros(1, 1, S, D, dtype=torch.bfloat16)
    eager = torch.compiler.disable(lambda: flex_attention(x, x, x))
    report = explain(lambda x: flex_attention(x, x, x) + eager(), x, options={"inner_backend": "eager"})
    assert len(report.calls) == 1
    assert sum(report.outside.values()) == 1
    assert "outside" in str(report)


@pytest.mark.parametrize("how", ["command", "module"])
def test_runs_a_script(how, script, capsys, monkeypatch):
    from cudnn_flex_compile import run

    monkeypatch.setenv("CUDNN_FLEX_LOWER", "always")
    code = cli.main(["run", script, "a", "--b"]) if how == "command" else run.main([script, "a", "--b"])
    assert code == 0
    assert inductor_seam.installed() is None
    shown = capsys.readouterr()
    assert shown.out == "given ['a', '--b']\n"
    assert "1 lowered to cuDNN, 0 kept" in shown.err
    assert "script.py:10 <lambda>" in shown.err or "x2" in shown.err


def test_runs_a_module_and_says_what_is_no_file(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "nowhere.py"])
    assert stop.value.code == 2
    assert "'nowhere.py' is no file" in capsys.readouterr().err
    assert cli.main(["run", "-m", "this"]) == 0
    assert "Zen of Python" in capsys.readouterr().out
