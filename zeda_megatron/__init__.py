"""ZEDA on Megatron-Core: a static Mixture-of-Experts model becomes a dynamic one.

    import zeda_megatron as zm

    spec = zm.apply_zero_experts(spec, zm.ZeroExpertConfig(num_zero_experts=64))   # any Megatron GPT layer spec
    zm.install_dispatchers(model)                                                  # once the model is built
    zm.zero_share(model)                                                           # after some passes
    zm.convert.hf_to_megatron("hf", "checkpoint", num_zero_experts=64)             # and megatron_to_hf, verify
    zm.load("checkpoint").chunk                                                    # a model ready to run

`examples/own_loop.py` is a training loop made of these. Where there is no GPU, the first of these names makes
Megatron-Core run on the CPU, so take one before you import Megatron.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ZeroExpertConfig": "config.zero_experts.ZeroExpertConfig",
    "apply_zero_experts": "moe.spec.apply_zero_experts",
    "install_dispatchers": "moe.dispatch.install_dispatchers",
    "zero_share": "moe.stats.zero_share",
    "load": "models.load.load_model",
    "convert": "convert",
}
"""Public name -> where it is. They are imported when they are first used: settings alone need no torch."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if not home.startswith("config."):
        import_module(".runtime.cpu", __name__).install()
    if "." not in home:
        return import_module(f".{home}", __name__)
    module, _, attribute = home.rpartition(".")
    return getattr(import_module(f".{module}", __name__), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
