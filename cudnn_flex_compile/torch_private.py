"""Every private name of torch that the package uses, each once, with its use and the way to do without it.

This file may import torch alone. A name is looked up where it has moved least; one that has moved costs what its row
says, and never the import of the backend. `missing()` lists those of this torch.
"""

import contextlib
import functools
import operator
import pkgutil
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

SEEN = "2.11.0, 2.13.0, 2.14.1"  # the versions of torch that have all of these names


@dataclass(frozen=True, slots=True)
class Name:
    """A private name of torch.

    Attributes:
        where: the module, a colon, and the attribute.
        use: the package's use of it.
        without: the consequence where it is missing.
        cuda: whether only builds with CUDA have it.
    """

    where: str
    use: str
    without: str
    cuda: bool = False

    def value(self) -> Any:
        """The value, or None where it is missing, even if the look-up raises."""
        try:
            return pkgutil.resolve_name(self.where)
        except Exception:
            return None


NAMES: list[Name] = []


def _now(where: str, use: str, without: str, fallback: Any, cuda: bool = False) -> Any:
    """The value of a name that `import torch` has, or the fallback."""
    NAMES.append(Name(where, use, without, cuda))
    found = NAMES[-1].value()
    return fallback if found is None else found


def _later(where: str, use: str, without: str, fallback: Any = None) -> Callable[[], Any]:
    """A function that gives the value of a name, whose module is imported only then, or the fallback."""
    name = Name(where, use, without)
    NAMES.append(name)

    @functools.cache
    def value() -> Any:
        found = name.value()
        return fallback if found is None else found

    return value


def missing() -> list[Name]:
    """The names that this torch should have, and has not."""
    built = torch.version.cuda is not None
    return [name for name in NAMES if (built or not name.cuda) and name.value() is None]


# Launches: each is called at every run of a compiled graph.
current_device: Callable[[], int] = _now(
    "torch:_C._cuda_getDevice", "the current CUDA device",
    "torch.cuda.current_device, which takes the host longer", torch.cuda.current_device, cuda=True,
)  # fmt: skip
current_stream: Callable[[int], int] = _now(
    "torch:_C._cuda_getCurrentRawStream", "the address of a device's current stream",
    "torch.cuda.current_stream, which takes the host longer",
    lambda device: torch.cuda.current_stream(device).cuda_stream, cuda=True,
)  # fmt: skip
empty_on_device: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor] = _now(
    "torch:_C._dynamo.guards._empty_strided_cuda", "allocates on the current CUDA device, as Inductor's code does",
    "torch.empty_strided, which takes the host longer",
    lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype, device="cuda"),
)  # fmt: skip
capturing: Callable[[], bool] = _now(
    "torch:_C._cuda_isCurrentStreamCapturing", "whether a CUDA graph is being captured",
    "torch.cuda.is_current_stream_capturing, which takes the host longer", torch.cuda.is_current_stream_capturing,
    cuda=True,
)  # fmt: skip
deterministic: Callable[[], bool] = _now(
    "torch:_C._get_deterministic_algorithms", "whether algorithms must be deterministic",
    "torch.are_deterministic_algorithms_enabled, which takes the host longer",
    torch.are_deterministic_algorithms_enabled,
)  # fmt: skip
tensor_guards: Any = _now(
    "torch:_C._dynamo.guards.TensorGuards", "whether tensors look as others did, as Dynamo's guards ask it",
    "every call makes its key, which takes the host longer", None,
)  # fmt: skip
dispatch_modes: Callable[[], int] = _now(
    "torch:_C._len_torch_dispatch_stack", "how many dispatch modes are on",
    "every call goes through torch's dispatcher, which takes the host longer", lambda: 1,
)  # fmt: skip
profiling: Callable[[], bool] = _now(
    "torch.autograd:_profiler_enabled", "whether a profiler listens",
    "every call makes its event, and goes through torch's dispatcher", lambda: True,
)  # fmt: skip
_versioned = _now(
    "torch:Tensor._version", "how often a tensor was written to",
    "no tensor is known to be unchanged, so masks are compared at each step", None,
)  # fmt: skip
version_of: Callable[[torch.Tensor], Any] = operator.attrgetter("_version") if _versioned else lambda tensor: object()
assert_on_device: Callable[[torch.Tensor], Any] = _now(
    "torch:_assert_async", "has the device stop where a boolean is false, also in a CUDA graph",
    "a read out of bounds, at which CUDA stops, too",
    lambda right: torch.zeros(1, device=right.device).take((~right).long()),
)  # fmt: skip

# Measuring and certifying plans.
sleep: Callable[[int], Any] = _now(
    "torch.cuda:_sleep", "keeps the device busy, while the host enqueues what is timed",
    "times have some of the host's time in them", lambda cycles: None,
)  # fmt: skip
make_dual: Callable[..., Any] = _now(
    "torch:_VF._make_dual", "forward-mode duals, without what forward_ad.make_dual compiles at first",
    "forward_ad.make_dual, whose first call takes a quarter of a second", forward_ad.make_dual,
)  # fmt: skip
set_deterministic: Callable[..., None] = _now(
    "torch:_C._set_deterministic_algorithms", "lets certification use any algorithm",
    "torch.use_deterministic_algorithms, which also sets Inductor's option", torch.use_deterministic_algorithms,
)  # fmt: skip
_excluded = _now("torch:_C._dispatch_tls_local_exclude_set", "autograd below an op", "`above_autograd` says it", None)
_included = _now("torch:_C._dispatch_tls_local_include_set", "autograd below an op", "`above_autograd` says it", None)
_dispatching = _now("torch:_C._ForceDispatchKeyGuard", "autograd below an op", "`above_autograd` says it", None)
_function_modes: Callable[[], int] = _now(
    "torch.overrides:_len_torch_function_stack", "how many function modes are on",
    "a kernel of Inductor's may be compiled anew where a default device is set", lambda: 0,
)  # fmt: skip
_without_mode: Callable[[], Any] = _now(
    "torch.overrides:_pop_mode_temporarily", "takes away a function mode, as that of a default device",
    "a kernel of Inductor's may be compiled anew where a default device is set", contextlib.nullcontext,
)  # fmt: skip


# The dispatcher skips the first line of these keys below autograd, and all of them below a TorchDispatchMode, under
# which AOTAutograd runs the first call of each graph. Dynamo traces no vmap then, and so no flex_attention.
PASSED_OVER = (
    "AutogradCUDA", "AutogradCPU", "AutogradFunctionality", "ADInplaceOrView",
    "AutogradOther", "AutogradNestedTensor", "Functionalize", "Conjugate", "Negative", "ZeroTensor", "PreDispatch",
    "FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode", "FuncTorchBatched", "FuncTorchVmapMode",
    "FuncTorchGradWrapper", "PythonTLSSnapshot",
)  # fmt: skip


_without_hooks = _later(
    "torch._dynamo.utils:_disable_saved_tensors_hooks_during_tracing", "saves tensors of ours without the user's hooks",
    "a first step under such hooks, as those of checkpointing, fails", contextlib.nullcontext,
)  # fmt: skip


def without_saved_tensors_hooks() -> Any:
    """A context in which hooks of saved tensors, such as those of checkpointing, see none that autograd saves, in this
    thread.
    """
    return _without_hooks()()


@contextlib.contextmanager
def above_autograd() -> Generator[None]:
    """Lets a kernel, which runs below autograd, use autograd and torch.compile themselves, in its own thread.

    It runs outside of function modes, on which Dynamo guards: torch has one on as it runs the backward of a graph for
    the first time, and none as it records that in a CUDA graph, where nothing can be compiled.

    Raises RuntimeError where a name is missing: a shape that has no plan and came up at run time does not run then.
    """
    if None in (_excluded, _included, _dispatching):
        raise RuntimeError(
            "cudnn_flex: a shape without a certified plan came up at run time, and this torch has moved what its other "
            f"kernel needs ({SEEN} have it): call torch.compiler.reset(), and compile with this shape"
        )
    keys: Any = torch._C.DispatchKey  # pyright: ignore[reportAttributeAccessIssue]
    exclude = _excluded()
    for name in PASSED_OVER:
        exclude = exclude.remove(getattr(keys, name))
    with contextlib.ExitStack() as without_modes:
        for _ in range(_function_modes()):
            without_modes.enter_context(_without_mode())
        without_modes.enter_context(without_saved_tensors_hooks())
        with _dispatching(_included(), exclude), torch.inference_mode(False), torch.enable_grad():
            yield


# Reading Dynamo's graphs.
set_grad_mode: Any = _now(
    "torch:_C._set_grad_enabled", "the grad mode at each call of a graph", "that of its compile is taken", None
)
enter_inference_mode, exit_inference_mode = (
    _now(f"torch.autograd.grad_mode:{name}", "calls in an inference mode of the graph", "these calls fail", None)
    for name in ("_enter_inference_mode", "_exit_inference_mode")
)
OpOverload: type = type(torch.ops.aten.add.Tensor)  # the class torch._ops.OpOverload
OpOverloadPacket: type = type(torch.ops.aten.add)
HigherOrderOperator: Any = _now(
    "torch._ops:HigherOrderOperator", "what a node with regions writes into",
    "such a node is taken to write into all that it is given", type(NotImplemented),
)  # fmt: skip
dispatch_mode: Any = _now(
    "torch.utils._python_dispatch:TorchDispatchMode", "what a function of several ops writes into",
    "it is taken to write into all that it is given", object,
)  # fmt: skip
is_wrapped: Callable[[torch.Tensor], bool] = _now(
    "torch:_C._functorch.is_functorch_wrapped_tensor", "whether a tensor is one inside vmap",
    "such a tensor is taken to share memory with all others", lambda tensor: False,
)  # fmt: skip
unwrapped: Callable[[torch.Tensor], torch.Tensor] = _now(
    "torch:_C._functorch.get_unwrapped", "what a tensor inside vmap is made of",
    "such a tensor is taken to share memory with all others", lambda tensor: torch.empty(0).to_sparse(),
)  # fmt: skip
wraps_tensors: Callable[[Any], bool] = _now(
    "torch.utils._python_dispatch:is_traceable_wrapper_subclass", "whether a tensor is made of others, as DTensors are",
    "the method by which such a type is known", lambda tensor: hasattr(type(tensor), "__tensor_flatten__"),
)  # fmt: skip
without_modes: Callable[[], Any] = _now(
    "torch.utils._python_dispatch:_disable_current_modes", "reads numbers while Dynamo traces",
    "calls with constant tensors are kept", contextlib.nullcontext,
)  # fmt: skip
fake_mode_type: Any = _now(
    "torch._subclasses.fake_tensor:FakeTensorMode", "traces score_mods and mask_mods",
    "every call is kept", None,
)  # fmt: skip
_fake = _now("torch._subclasses.fake_tensor:FakeTensor", "which inputs have no data", "every call is kept", None)
needed_for_lowering = [name for name, value in zip(NAMES[-2:], (fake_mode_type, _fake), strict=True) if value is None]


_functorch_options = _later(
    "torch._functorch.config:patch", "compiles kernels for tensors without data", "options of the user's decide",
    lambda **_: contextlib.nullcontext(),
)  # fmt: skip


@contextlib.contextmanager
def fake_tensors() -> Generator[None]:
    """Has tensors made without data, in this thread. They take no memory, and no device needs to be there.

    Their address, which is 0, may be read, as compilers of kernels do. torch warns of the first such read in a process;
    it is done here, where no warning is shown.
    """
    with _functorch_options()(fake_tensor_allow_unsafe_data_ptr_access=True), fake_mode_type():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.empty(1).data_ptr()
        yield


def is_fake(value: Any) -> bool:
    """Whether a value is a tensor without data, as Dynamo's examples are."""
    return _fake is not None and isinstance(value, _fake)


def example_of(node: Any, *default: Any) -> Any:
    """The fake tensor or symbolic number that Dynamo recorded for a node. Raises KeyError, unless given a default."""
    return node.meta.get("example_value", *default) if default else node.meta["example_value"]


def set_example(node: Any, value: Any) -> None:
    """Records the example of a node that the pass wrote, for later passes."""
    node.meta["example_value"] = value


def has_hooks(tensor: torch.Tensor) -> bool:
    """Whether a hook may change the tensor's gradient."""
    return bool(getattr(tensor, "_backward_hooks", None))


def schema_of(op: Any) -> Any:
    """The schema of an OpOverload, with its arguments' names and which of them it writes to."""
    return op._schema


def storage_of(tensor: torch.Tensor) -> int:
    """A number that tensors of one storage share, also fake ones. Raises NotImplementedError inside vmap."""
    return tensor.untyped_storage()._cdata


def hint_of(size: Any) -> Any:
    """The value of a symbolic size in the call that is being compiled, without a guard; None if it depends on data."""
    return size.node.hint


def expression_of(size: Any) -> Any:
    """The sympy expression of a symbolic size, which can be compared without a guard."""
    return size.node.expr


# Dynamo.
_compile_context = _later(
    "torch._guards:CompileContext", "whether a piece of code is compiled again", "reports count no recompiles"
)
recompile_limit: Callable[[], type[BaseException]] = _later(
    "torch._dynamo.exc:FailOnRecompileLimitHit", "the error of a function that was compiled for too many inputs",
    "any error has such a function compiled anew, once", Exception,
)  # fmt: skip
_dynamo_options = _later(
    "torch._dynamo:config", "how often benchmarks may compile a function", "as often as torch allows by itself"
)
compiled_module: Callable[[], Any] = _later(
    "torch._dynamo.eval_frame:OptimizedModule", "explains what was compiled already", "`explain` compiles it twice", ()
)
lookup_backend: Callable[[], Any] = _later(
    "torch._dynamo.backends.registry:lookup_backend", "inner backends by name",
    "torch.compile, which traces the graph again",
    lambda name: lambda graph, inputs, **how: torch.compile(graph, backend=name, **how),
)  # fmt: skip
list_backends: Callable[[], Any] = _later(
    "torch._dynamo.backends.registry:list_backends", "the names of inner backends", "those of torch.compiler",
    torch.compiler.list_backends,
)  # fmt: skip
invalid_backend: Callable[[], Any] = _later(
    "torch._dynamo.exc:InvalidBackend", "the error of an unknown inner backend", "that error is torch's own", ()
)


_eager_key = _now(
    "torch:_C.DispatchKey.CompositeExplicitAutograd", "tells explain of eager flex_attention calls",
    "explain does not list them", None,
)  # fmt: skip


def compiling() -> bool:
    """Whether Dynamo is compiling, in this thread."""
    context = _compile_context()
    return context is not None and context.current_compile_id() is not None


def allow_recompiles(count: int) -> None:
    """Has Dynamo compile a function for so many kinds of inputs."""
    options = _dynamo_options()
    if options is not None:
        options.recompile_limit = count


def recompiles() -> bool:
    """Whether Dynamo is compiling code that it compiled before, for other inputs."""
    context = _compile_context()
    compiling = None if context is None else context.current_compile_id()
    return compiling is not None and bool(compiling.frame_compile_id)


def original_of(model: Any) -> Any:
    """The argument of torch.compile, if `model` is the module that it returned; else the model."""
    return getattr(model, "_orig_mod", model) if isinstance(model, compiled_module()) else model


def original_function(function: Any) -> Any:
    """The argument of torch.compile, if `function` is the function that it returned; else the function."""
    return getattr(function, "_torchdynamo_orig_callable", function)


def compiled_call(module: torch.nn.Module) -> Any:
    """The function that `module.compile()` set, or None."""
    return getattr(module, "_compiled_call_impl", None)


def set_compiled_call(module: torch.nn.Module, call: Any) -> None:
    """Sets the function of `module.compile()`, or None."""
    module._compiled_call_impl = call


def context_fn_of(region: torch.fx.GraphModule) -> Any:
    """The context_fn of a region that is checkpointed by a policy, where Dynamo leaves it; or None."""
    return region.meta.get("_checkpoint_context_fn")


def set_context_fn(region: torch.fx.GraphModule, context_fn: Any) -> None:
    """Sets the context_fn of a checkpointed region."""
    region.meta["_checkpoint_context_fn"] = context_fn


def eager_kernel(op: Any) -> Any:
    """The function that runs a higher-order op on tensors with data; None where it is not found."""
    return getattr(op, "py_kernels", {}).get(_eager_key)


def set_eager_kernel(op: Any, kernel: Any) -> None:
    """Sets the function that runs a higher-order op on tensors with data.

    Note [Listening to eager calls]. torch has no hook for calls of a higher-order op. This is done while `explain`
    runs, by a function that calls the one that was there, and taken back at its end.
    """
    op.py_kernels[_eager_key] = kernel
    op._dispatch_cache.clear()


# Inductor.
inductor_options: Callable[[], Any] = _later(
    "torch._inductor:config", "where install() puts a pass of ours", "install() raises an error"
)
custom_graph_pass: Callable[[], Any] = _later(
    "torch._inductor.custom_graph_pass:CustomGraphPass", "what Inductor takes a pass for", "passes are not cached",
    object,
)  # fmt: skip
_compile_fx = _later(
    "torch._inductor.compile_fx:compile_fx", "compiles everything but attention", "Inductor as Dynamo finds it does"
)
_list_mode_options = _later("torch._inductor:list_mode_options", "what torch.compile's `mode` means", "it is refused")
inductor_triton: Callable[[], Any] = _later(
    "torch._inductor.config:triton", "whether CUDA graphs are asked for",
    "a graph of attention alone goes through Inductor, too",
)  # fmt: skip
_donated = _later(
    "torch._functorch.config:donated_buffer", "times a backward several times", "backwards of Inductor are not timed"
)
_add_needs_realized_inputs, _register_lowering, _fallback_handler, _fallback_kernel, _virtualized = (
    _later(f"torch._inductor.{where}", "calls plans from Inductor's code", "by torch's dispatcher, which takes longer")
    for where in (
        "lowering:add_needs_realized_inputs", "lowering:register_lowering", "lowering:fallback_handler",
        "ir:FallbackKernel", "virtualized:V",
    )
)  # fmt: skip


_tracing, _tracing_context, _shape_env = (
    _later(where, "lets Inductor's caches take graphs of ours", "each process compiles such graphs")
    for where in (
        "torch._guards:tracing", "torch._guards:TracingContext", "torch.fx.experimental.symbolic_shapes:ShapeEnv",
    )
)  # fmt: skip


def compile_fx() -> Callable[..., Any]:
    """Inductor: takes a graph, its inputs and `config_patches`."""
    return _compile_fx() or lookup_backend()("inductor")


@contextlib.contextmanager
def without_dynamo() -> Generator[None]:
    """Has Inductor's caches take a graph that Dynamo did not make, whose sizes are constants.

    Note [A tracing context of our own]. The caches read the guards of a graph's sizes from the shape environment of the
    current tracing context, and are bypassed without one (`FxGraphCache._get_shape_env`). The context lasts for one
    compilation, in its thread. It may go when `torch._inductor.standalone_compile` is as fast to call.
    """
    tracing, context, shapes = _tracing(), _tracing_context(), _shape_env()
    if None in (tracing, context, shapes, fake_mode_type):
        yield
        return
    with tracing(context(fake_mode_type(shape_env=shapes(assume_static_by_default=True)))):
        yield


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's options for a mode of torch.compile. Raises ValueError where they are not known."""
    options = _list_mode_options()
    if options is None:
        raise ValueError(f"mode={mode!r} is not known to torch {torch.__version__}'s Inductor: give its inner_options")
    return options(mode)


# The modules of functions each of which is an op of the same name. A function of another module is taken for no op.
PREDISPATCH = "torch._functorch.predispatch"
BINDINGS = {"torch", "torch._C._functorch", PREDISPATCH,
            *(f"torch._C._{n}" for n in ("nn", "linalg", "fft", "special", "sparse", "nested"))}  # fmt: skip


def keep_buffers() -> None:
    """Lets a backward be called several times."""
    if _donated() is not None:
        import torch._functorch.config as config

        config.donated_buffer = False


def call_from_inductor(op: Any, name: str) -> None:
    """Makes Inductor's Python code call a function where it would call an op.

    Note [Inductor's name of an op's kernel]. This registers a lowering for our own op, which does what a missing one
    does, and then sets the name that the generated code calls: Inductor has no public way to do so (its own
    `ir.FallbackKernel.codegen` reads `python_kernel_name`). It changes nothing for other ops, and is done once. It may
    go when a custom op can say which Python function implements it.

    Args:
        name: the function, as generated code finds it.
    """
    parts = _add_needs_realized_inputs(), _register_lowering(), _fallback_handler(), _fallback_kernel(), _virtualized()
    if None in parts:
        return
    realize, register, handler, kernel, V = parts

    def lower(*args: Any, **kwargs: Any) -> Any:
        outputs = handler(op, add_to_fallback_set=False)(*args, **kwargs)
        if not V.graph.cpp_wrapper and not getattr(V.graph, "fx_wrapper", False):
            mine = [o for o in V.graph.operations if isinstance(o, kernel) and o.op_overload is op]
            if mine:
                mine[-1].python_kernel_name = name
        return outputs

    realize(op)
    register(op, type_promotion_kind=None)(lower)
