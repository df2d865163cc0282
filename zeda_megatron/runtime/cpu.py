"""Megatron-Core on CPU and gloo: the one module of this project that patches anything.

Megatron-Core names the CUDA device in many places. On a machine without CUDA, `install()` gives every
`megatron.core.*` module a stand-in for its global `torch` whose factories allocate on the CPU and whose
`.cuda` answers harmlessly. User code keeps the real torch. With CUDA present `install()` does nothing, so the
GPU path is stock Megatron.

Call it before the first `megatron.core` import; modules imported later are covered by an import hook.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import logging
import sys
import threading
import types
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from ..errors import UserError

SUPPORTED = ("0.16", "0.19")
_PREFIX = "megatron.core"


def needed() -> bool:
    """True where Megatron has to run without CUDA."""
    return not torch.cuda.is_available()


def install() -> bool:
    """Make Megatron-Core run on the CPU. Idempotent; returns False (and changes nothing) where CUDA is present.

    Here or there, warnings of libraries that a user can do nothing about are silenced (`quiet`).
    """
    quiet()
    if not needed():
        return False
    if any(isinstance(finder, _CoreFinder) for finder in sys.meta_path):
        return True
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        raise UserError(
            "megatron-core is not installed: pip install megatron-core==0.16.1 (Python 3.12 and newer: 0.19.2)"
        ) from None
    if not found.startswith(tuple(f"{series}." for series in SUPPORTED)):
        raise UserError(
            f"megatron-core {found} has no CPU runtime here (supported: {', '.join(SUPPORTED)}.x): "
            "pip install megatron-core==0.16.1 (Python 3.12 and newer: 0.19.2)"
        )
    if found.startswith("0.19.") and find_spec("triton") is None:
        raise UserError("megatron-core 0.19 does not import without triton: pip install triton")
    sys.meta_path.insert(0, _CoreFinder())
    for name, module in list(sys.modules.items()):
        if name == _PREFIX or name.startswith(_PREFIX + "."):
            _adapt(module)
    _patch_tensor_methods()
    return True


class _NoStream:
    """A CUDA stream or event that has nothing to wait for."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def record_event(self, event=None):
        return event or _NoStream()

    def elapsed_time(self, other) -> float:
        return 0.0

    def query(self) -> bool:
        return True

    def _nothing(self, *args, **kwargs) -> None:
        return None

    synchronize = wait_stream = wait_event = wait = record = _nothing


class _CudaNamespace(types.ModuleType):
    """What Megatron sees as `torch.cuda` on a machine without CUDA."""

    Stream = Event = _NoStream

    def __init__(self) -> None:
        super().__init__("torch.cuda")

    def __getattr__(self, name: str):
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def current_stream(*args, **kwargs) -> _NoStream:
        return _NO_STREAM

    default_stream = current_stream

    @staticmethod
    def stream(stream):
        return contextlib.nullcontext()

    @staticmethod
    def synchronize(*args, **kwargs) -> None:
        return None

    @staticmethod
    def is_current_stream_capturing() -> bool:
        return False

    @staticmethod
    def get_rng_state(*args, **kwargs) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state, *args, **kwargs) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def empty_cache() -> None:
        return None

    @staticmethod
    def memory_allocated(*args, **kwargs) -> int:
        return 0

    max_memory_allocated = memory_allocated


_NO_STREAM = _NoStream()
_CUDA = _CudaNamespace()
_FACTORIES = (
    "arange as_tensor empty empty_like eye full full_like linspace ones ones_like rand rand_like randint "
    "randn randn_like tensor zeros zeros_like"
).split()


def _on_cpu(factory: Callable) -> Callable:
    def make(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


class _TorchProxy(types.ModuleType):
    """`torch` with CPU factories and a harmless `.cuda`."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CUDA
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str):
        return getattr(torch, name)


_TORCH = _TorchProxy()


class _CoreFinder(importlib.abc.MetaPathFinder):
    """Adapts each `megatron.core` module right after it was imported."""

    def find_spec(self, name, path=None, target=None):
        if name != _PREFIX and not name.startswith(_PREFIX + "."):
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _AdaptingLoader(spec.loader)
                return spec
        return None


class _AdaptingLoader(importlib.abc.Loader):
    def __init__(self, loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        self._loader.exec_module(module)
        _adapt(module)


def _adapt(module: types.ModuleType) -> None:
    if getattr(module, "torch", None) is torch:
        module.torch = _TORCH
    extra = _EXTRA.get(module.__name__)
    if extra is not None:
        extra(module)


def _no_jit(module) -> None:
    # torch.compile needs a C++ compiler and buys nothing here; must happen before others bind `jit_fuser`.
    module.disable_jit_fuser()


def _define_te_names(module) -> None:
    # moe_utils uses these names without Transformer Engine and raises NameError (fixed upstream in 0.19).
    for name in (
        "fused_compute_score_for_moe_aux_loss fused_moe_aux_loss fused_permute fused_permute_with_probs "
        "fused_sort_chunks_by_index fused_sort_chunks_by_index_with_probs fused_topk_with_score_function "
        "fused_unpermute te_general_gemm"
    ).split():
        if not hasattr(module, name):
            setattr(module, name, None)


def _splits_as_lists(module) -> None:
    # all_to_all_single wants Python or numpy integers; upstream converts CUDA tensors only.
    stock = module.maybe_move_tensor_to_cpu

    def move(tensor, as_numpy: bool = False, record_stream: bool = False):
        if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return stock(tensor, as_numpy=as_numpy, record_stream=False)

    module.maybe_move_tensor_to_cpu = move


def _uneven_gather(module) -> None:
    # gloo's all_gather refuses pieces of different sizes: pad, gather, cut.
    stock = module._gather_along_first_dim

    def gather(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1 or len(set(output_split_sizes)) == 1:
            return stock(input_, group, output_split_sizes, use_global_buffer)
        longest = max(output_split_sizes)
        padded = input_.new_zeros((longest, *input_.shape[1:]))
        padded[: input_.shape[0]] = input_
        pieces = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(pieces, padded, group=group)
        return torch.cat([piece[:n] for piece, n in zip(pieces, output_split_sizes)], dim=0)

    module._gather_along_first_dim = gather


def _cpu_generator(module) -> None:
    # Activation recomputation and the tensor-parallel generators keep "the CUDA state": here it is the CPU's.
    def get_state(device=None, clone: bool = False, graph_safe: bool = False):
        return torch.get_rng_state()

    def set_state(new_state, device=None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    module._get_cuda_rng_state, module._set_cuda_rng_state = get_state, set_state


def _no_transformer_engine(module) -> None:
    # Asked for a version of what is not there, upstream compares None with it.
    module.is_te_min_version = lambda version, check_equality=True: False


def _offload_on_the_host(module) -> None:
    # Megatron's optimizer with states in host memory keeps a copy there of every parameter that lies on a GPU. Here all
    # lie in host memory already, and get the copy too, so that every step goes the same way: gradients to the copy, an
    # update of the copy, the copy's values back.
    def groups(self, fraction: float):
        on_host, copies, originals, exact = [], {}, {}, {}
        for group in self.param_groups:
            mine = {**group, "params": []}
            for parameter in group["params"]:
                copy = parameter.detach().clone()
                if self.param_update_in_fp32 and copy.dtype != torch.float32:
                    copy = exact[parameter] = copy.float()
                copies[parameter], originals[copy] = copy, parameter
                mine["params"].append(copy)
            if mine["params"]:
                on_host.append(mine)
        return on_host, [], copies, originals, exact

    module.HybridDeviceOptimizer._get_sub_optimizer_param_groups = groups


_EXTRA: dict[str, Callable] = {
    "megatron.core.utils": _no_transformer_engine,
    "megatron.core.optimizer.cpu_offloading.hybrid_optimizer": _offload_on_the_host,
    "megatron.core.jit": _no_jit,
    "megatron.core.transformer.moe.moe_utils": _define_te_names,
    "megatron.core.transformer.moe.token_dispatcher": _splits_as_lists,
    "megatron.core.tensor_parallel.mappings": _uneven_gather,
    "megatron.core.tensor_parallel.random": _cpu_generator,
}

_CUDA_TYPE = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def _called_by_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith(_PREFIX)


def _patch_tensor_methods() -> None:
    """`Tensor.type()` and `.cuda()` answer for a GPU when Megatron asks, and as always when others do."""
    stock_type, stock_cuda = torch.Tensor.type, torch.Tensor.cuda

    def tensor_type(self, *args, **kwargs):
        if not args and not kwargs and self.dtype in _CUDA_TYPE and _called_by_megatron():
            return _CUDA_TYPE[self.dtype]
        return stock_type(self, *args, **kwargs)

    def tensor_cuda(self, *args, **kwargs):
        return self if _called_by_megatron() else stock_cuda(self, *args, **kwargs)

    torch.Tensor.type, torch.Tensor.cuda = tensor_type, tensor_cuda


def quiet() -> None:
    """Silence what a user can do nothing about, and nothing else."""
    # Megatron warns about every optional package it does not find; `zeda doctor` tells that better.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # Collectives that Megatron calls have a new name in PyTorch.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # Its checkpoints use PyTorch's older interface: three warnings at every save and load.
    for module in (r"megatron\.core\.dist_checkpointing", r"torch\.distributed\.checkpoint"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    for words in ("The argument order of", "torch.distributed is disabled"):  # newer ones, at every load
        warnings.filterwarnings("ignore", words, UserWarning, module=r"torch\.distributed\.checkpoint")
    # Newer ones advise every user of GPTModel to use another class, and every checkpoint another writer and reader.
    for name in (
        "models.gpt.gpt_model",
        "dist_checkpointing.strategies.torch",
        "dist_checkpointing.strategies.common",
    ):
        logging.getLogger(f"megatron.core.{name}").addFilter(_no_advice)
    # PyTorch with CUDA, imported where no GPU is (Megatron wants its compiler): `zeda doctor` tells that better, too.
    logging.getLogger("torch.utils.cpp_extension").addFilter(_no_missing_gpu)
    # TensorBoard's writer fails in a thread of its own; it raises the same at the next call, which tells it in a line.
    if not isinstance(threading.excepthook, _ButTensorBoard):
        threading.excepthook = _ButTensorBoard(threading.excepthook)


class _ButTensorBoard:
    """The hook that was there before, for all other threads."""

    def __init__(self, others: Callable[[threading.ExceptHookArgs], object]):
        self.others = others

    def __call__(self, args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            self.others(args)


def _no_advice(record: logging.LogRecord) -> bool:
    return "is deprecated" not in record.getMessage().lower()


def _no_missing_gpu(record: logging.LogRecord) -> bool:
    return "No CUDA runtime" not in record.getMessage()
