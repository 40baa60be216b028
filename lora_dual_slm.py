"""LoRA on the frozen LLM: added, loaded beside the adapters, merged."""

import os

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from .backbones_dual_slm import refuse_wrong_keys


def _import_peft():
    """peft, which only checkpoints with LoRA need, and which takes a second to import."""
    try:
        import peft
        import peft.tuners.tuners_utils
    except ImportError as error:
        raise ImportError("LoRA on the LLM (lora_config) needs peft: `pip install peft`.") from error
    return peft


def add_lora(language_model: PreTrainedModel, lora_config: dict | None) -> None:
    """Adds LoRA in float32 to the LLM, and lets nothing else of it learn; without a config nothing happens.

    Args:
        lora_config: fields of peft's `LoraConfig`.
    """
    if lora_config is None:
        return
    language_model.add_adapter(_import_peft().LoraConfig(**lora_config))
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    language_model.eval()


def load_lora(model: PreTrainedModel, name: str | os.PathLike, options: dict) -> None:
    """Loads the LoRA tensors out of a checkpoint's model.safetensors.

    Args:
        model: with LoRA on its LLM.
        name: folder or Hub id of the checkpoint.
        options: `revision`, `subfolder` and Hub options.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    with safe_open(cached_file(name, "model.safetensors", **options), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if ".lora_" in key}  # noqa: SIM118 (not a dict)
    known = {key: value for key, value in model.state_dict().items() if ".lora_" in key}
    both = set(known) & set(tensors)
    mismatched = {key for key in both if known[key].shape != tensors[key].shape}
    refuse_wrong_keys(name, set(known) - set(tensors), set(tensors) - set(known), mismatched)
    model.load_state_dict(tensors, strict=False)


def merge_lora(language_model: PreTrainedModel) -> None:
    """Adds the LoRA products to the weights and removes the LoRA modules, so that peft is not needed any more."""
    layer = _import_peft().tuners.tuners_utils.BaseTunerLayer
    for name, module in list(language_model.named_modules()):
        if isinstance(module, layer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(language_model.get_submodule(parent), leaf, module.get_base_layer())
    language_model._hf_peft_config_loaded = False
    del language_model.peft_config
