"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`): names, no more."""

from __future__ import annotations

from contextlib import suppress

FAMILIES = {
    "qwen3_moe": "Qwen3Moe",
    "glm4_moe_lite": "Glm4MoeLite",
    "mixtral": "Mixtral",
    "glm4_moe": "Glm4Moe",
    "deepseek_v3": "DeepseekV3",
    "deepseek_v2": "DeepseekV2",
    "gpt_oss": "GptOss",
    "minimax_m2": "MiniMaxM2",
    "olmoe": "Olmoe",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_next": "Qwen3Next",
    "qwen3_5_moe": "Qwen3_5Moe",
}
"""`model_type`, which a file in `families` is named after, and what the names of its classes begin with. A process
imports the file of an architecture that it meets."""
SEEING = ("qwen3_5_moe",)
"""Those that see, too; the language model alone is of the type `..._text`."""

WEIGHTS = "zeda_folder"
"""Backend of --weight-transfer-config: `weight_folder`."""


def register() -> None:
    """Tell vLLM the architectures and a way for new weights to come, and transformers the authors' model types.

    May be called again.
    """
    from vllm import ModelRegistry

    for (stock, name), family in names().items():
        ModelRegistry.register_model(name, f"{__package__}.families.{family}:{name}")
        _correct_as(stock, name)
    _register_weights()
    _register_model_types()


def names() -> dict[tuple[str, str], str]:
    """Names of a stock class and of its class with zero experts -> the file of the second."""
    return {
        (stem + tail, f"{stem}PlusPlus{tail}"): family
        for family, stem in FAMILIES.items()
        for tail in ["ForCausalLM"] + ["ForConditionalGeneration"] * (family in SEEING)
    }


def _correct_as(stock: str, name: str) -> None:
    """What vLLM corrects in its settings by the name of a stock architecture holds for ours."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP as corrections

    if stock in corrections:
        corrections[name] = corrections[stock]


def _register_weights() -> None:
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as engines
    except ImportError:
        return  # an older vLLM, whose weights stay what they are
    with suppress(ValueError):  # it is registered already
        engines.register_engine(WEIGHTS, f"{__package__}.weight_folder", "FolderWeights")


def _register_model_types() -> None:
    """The authors' folders say `qwen3_moe_plus_plus`; vLLM keys on the native types, so they are read as those."""
    from transformers import CONFIG_MAPPING, AutoConfig

    for family in (*FAMILIES, *(f"{family}_text" for family in SEEING)):
        if family in CONFIG_MAPPING:  # an older transformers may lack it
            AutoConfig.register(f"{family}_plus_plus", _read_as(CONFIG_MAPPING[family]), exist_ok=True)


def _read_as(native: type) -> type:
    """A config class for another model type whose objects have the native one."""

    def init(self, **fields):
        native.__init__(self, **fields | {"model_type": native.model_type})
        self.model_type = native.model_type

    names = {"__init__": init, "model_type": f"{native.model_type}_plus_plus", "__module__": __name__}
    return type(f"{native.__name__.removesuffix('Config')}PlusPlusConfig", (native,), names)
