"""Speech language models that hear how something is said as well as what is said.

The imports are lazy: pytest imports this file a second time under the name of the repository's folder, and an eager
import would define every class twice.
"""

from importlib import import_module

__version__ = "0.2.0"

_EXPORTS = {
    "DualSLMConfig": "configuration_dual_slm",
    "DualSLMForConditionalGeneration": "modeling_dual_slm",
    "DualSLMAudioFeatures": "modeling_dual_slm",
    "LetterAdapter": "letters_dual_slm",
    "LinguisticAdapter": "adapters_dual_slm",
    "ParalinguisticAdapter": "adapters_dual_slm",
    "QueryAdapter": "adapters_dual_slm",
    "DualSLMProcessor": "processing_dual_slm",
    "DualSLMConversation": "conversation_dual_slm",
    "load_audio": "audio_dual_slm",
    "AudioTextToTextPipeline": "processing_dual_slm",
}
__all__ = ["__version__", "register_auto_classes", *_EXPORTS]  # pyright: ignore[reportUnsupportedDunderAll]


def register_auto_classes() -> None:
    """Lets AutoConfig, AutoModelForMultimodalLM and AutoProcessor know this package, so that no remote code is needed."""
    from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

    from dual_slm.configuration_dual_slm import DualSLMConfig
    from dual_slm.modeling_dual_slm import DualSLMForConditionalGeneration
    from dual_slm.processing_dual_slm import DualSLMProcessor

    AutoConfig.register("dual_slm", DualSLMConfig, exist_ok=True)
    AutoModelForMultimodalLM.register(DualSLMConfig, DualSLMForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(DualSLMConfig, DualSLMProcessor, exist_ok=True)


def __getattr__(name: str):
    if name in _EXPORTS:
        register_auto_classes()
        return getattr(import_module(f"dual_slm.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
