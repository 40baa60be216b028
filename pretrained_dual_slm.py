"""Loading and saving: a checkpoint is its adapters, and the backbones come from their own repositories."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .adapters_dual_slm import ParalinguisticAdapter, PortedTokens, QueryAdapter, SoftResidual, SoftTokens
from .backbones_dual_slm import (
    HUB_OPTIONS,
    SIDES,
    BackboneSource,
    load_backbones,
    name_in_errors,
    refuse_other_backbone,
    refuse_wrong_keys,
    resolve_backbone,
    resolve_commit,
)
from .configuration_dual_slm import FIELDS, DualSLMConfig
from .letters_dual_slm import Lexicon
from .lora_dual_slm import add_lora, load_lora, merge_lora
from .porting_dual_slm import plan_port

_MORE_FIELDS = ("audio_config", "text_config", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")


class DualSLMPreTrainedModel(PreTrainedModel):
    """Loads and saves the adapters alone, and the backbones by their own `from_pretrained`."""

    config_class = DualSLMConfig
    config: DualSLMConfig
    paralinguistic_adapter: Any
    linguistic_adapter: Any
    audio_tower: Any
    language_model: Any
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")  # pyright: ignore
    output_modalities = ("text",)
    supports_gradient_checkpointing = True
    _keys_to_ignore_on_load_missing = [r"soft_tokens\.keys"]  # noqa: RUF012 (read from the LLM, or refused)
    _keys_to_ignore_on_load_unexpected = [r"\.lora_"]  # noqa: RUF012 (loaded, and checked, once the LLM is there)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SoftResidual):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ParalinguisticAdapter):
            if module.slot_vectors is not None:
                init.normal_(module.slot_vectors, std=1.0)
            if module.layer_weights is not None:
                init.zeros_(module.layer_weights)
            if module.statistics:
                init.zeros_(module.statistics_mean)
                init.ones_(module.statistics_scale)
        elif isinstance(module, QueryAdapter):
            init.normal_(module.queries, std=1.0)
            if module.layer_weights is not None:
                init.zeros_(module.layer_weights)
        elif isinstance(module, Lexicon):
            init.zeros_(module.spellings)
            init.zeros_(module.counts)
            init.constant_(module.token_ids, -1)
        elif isinstance(module, SoftTokens):
            init.constant_(module.scale, 10.0)  # embedding rows are short (norm about 1-3)
            init.zeros_(module.token_ids)
            init.zeros_(module.keys)
            if isinstance(module, PortedTokens):
                init.zeros_(module.sources)

    @property
    def _adapter_modules(self) -> list[nn.Module]:
        adapters = (self.paralinguistic_adapter, self.linguistic_adapter)
        return [adapter for adapter in adapters if adapter is not None]

    def _freeze_backbones(self) -> None:
        for module in (self.audio_tower, self.language_model):
            module.requires_grad_(False)
            module.eval()

    def attach_backbones(
        self, audio_tower: PreTrainedModel, language_model: PreTrainedModel, lora: bool = True
    ) -> None:
        """Freezes the two backbones and puts them in place, with LoRA where the config has it and `lora` is true."""
        self.audio_tower, self.language_model = audio_tower, language_model
        self._freeze_backbones()
        self.post_init()  # collects tied keys and no-split modules anew; initialises nothing
        device: Any = language_model.get_input_embeddings().weight.device
        for adapter in self._adapter_modules:
            adapter.to(device)
        places = getattr(language_model, "hf_device_map", None) or {}
        if len(set(places.values())) > 1 and not {"cpu", "disk"} & {str(place) for place in places.values()}:
            # Pipeline and Trainer then move nothing. Our modules are with the LLM's embeddings, its first part.
            ours, first = ("audio_tower", "paralinguistic_adapter", "linguistic_adapter"), next(iter(places.values()))
            self.hf_device_map = {f"language_model.{name}".rstrip("."): place for name, place in places.items()}
            self.hf_device_map |= dict.fromkeys(ours, first)
        if lora:
            add_lora(language_model, self.config.lora_config)
        soft_tokens = getattr(self.paralinguistic_adapter, "soft_tokens", None)
        if soft_tokens is None or device.type == "meta":  # an embedding that is offloaded has no rows to keep
            return
        if soft_tokens.token_ids.any() and not soft_tokens.keys.any():
            soft_tokens.choose(soft_tokens.token_ids, language_model.get_input_embeddings())

    def train(self, mode: bool = True):
        """Keeps frozen modules in evaluation mode, so that their dropout stays off.

        An adapter counts as frozen when at most its residual learns.
        """
        super().train(mode)
        for adapter in self._adapter_modules:
            learns = [name for name, p in adapter.named_parameters() if p.requires_grad]
            adapter.train(mode and any(not name.startswith("residual.") for name in learns))
        for module in (self.audio_tower, self.language_model):
            if module is not None:
                module.eval()
        if mode and self.language_model is not None:
            # Activation checkpointing asks each layer whether it is in training; what is inside stays in evaluation.
            for module in self.language_model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True
            for name, module in self.language_model.named_modules():
                if "lora_dropout" in name:
                    module.train()
        return self

    @contextmanager
    def lora(self, enabled: bool) -> Iterator[None]:
        """Within it, LoRA is on or off. Off, the LLM is the bare LLM, bit for bit.

        This is a switch on the LLM itself, so threads that share the model must not use it at the same time.
        """
        switch = self.config.lora_config is not None and not enabled
        if switch:
            self.language_model.disable_adapters()
        try:
            yield
        finally:
            if switch:
                self.language_model.enable_adapters()

    def merge_lora(self, folder: str | os.PathLike) -> None:
        """Merges LoRA into the LLM, saves that LLM to `folder`, and names it in the config as the new backbone.

        Raises:
            ValueError: there is no LoRA.
        """
        if self.config.lora_config is None:
            raise ValueError("there is no LoRA to merge: lora_config is None.")
        merge_lora(self.language_model)
        self.language_model.save_pretrained(folder)
        self.config.lora_config = None
        self.config.text_model_id, self.config.text_model_revision = str(folder), None
        self.config.text_model_fingerprint = BackboneSource(str(folder)).fingerprint()

    # ---- loading and saving -----------------------------------------------------------------------------------------

    def frozen_keys(self) -> list[str]:
        """Names of all tensors of the backbones, without those of LoRA."""
        frozen = ("audio_tower.", "language_model.")
        return [key for key in self.state_dict() if key.startswith(frozen) and ".lora_" not in key]

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:
        return self.frozen_keys()

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, value) -> None:
        pass  # post_init assigns it

    @classmethod
    def from_backbones(
        cls,
        audio_model_id: str,
        text_model_id: str,
        audio_revision: str | None = None,
        text_revision: str | None = None,
        dtype=None,
        device_map=None,
        quantization_config=None,
        attn_implementation=None,
        **kwargs,
    ):
        """New adapters between two backbones.

        Args:
            audio_model_id, text_model_id: a Hub id, a local folder, or a name of `dual-slm backbones`.
            audio_revision, text_revision: commit, branch or tag on the Hub.
            dtype, device_map, quantization_config, attn_implementation: for the backbones, as in `from_pretrained`. The
                adapters are float32.
            kwargs: fields of [`DualSLMConfig`]; `token`, `cache_dir`, `force_download` and `local_files_only` for the Hub.

        Raises:
            TypeError: a keyword that is neither.
        """
        options = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        options |= {"quantization_config": quantization_config}
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        unknown = kwargs.keys() - FIELDS.keys() - vars(PreTrainedConfig()).keys() - set(_MORE_FIELDS)
        if unknown:
            raise TypeError(f"from_backbones: {', '.join(sorted(unknown))} is no field of DualSLMConfig.")
        # A branch moves, so what is loaded, hashed and written into the config is one commit.
        audio = BackboneSource(audio_model_id, resolve_commit(audio_model_id, audio_revision, **hub_kwargs))
        text = BackboneSource(text_model_id, resolve_commit(text_model_id, text_revision, **hub_kwargs))
        audio_tower, language_model, audio_config = load_backbones(audio, text, options | hub_kwargs)
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_backbone(text_model_id), revision=text.revision, **hub_kwargs
        )
        placeholders: dict[str, Any] = {
            "paralinguistic_token_id": len(tokenizer),
            "linguistic_token_id": len(tokenizer) + 1,
        }
        config = DualSLMConfig(
            audio_config=audio_config.to_dict(),  # copies: a composite model writes into its sub-configs
            text_config=language_model.config.to_dict(),
            audio_model_id=audio_model_id,
            audio_model_revision=audio.revision,
            audio_model_fingerprint=audio.fingerprint(**hub_kwargs),
            text_model_id=text_model_id,
            text_model_revision=text.revision,
            text_model_fingerprint=text.fingerprint(**hub_kwargs),
            **(placeholders | kwargs),
        )
        # A saved config must name the backbones, not their folders, nor how they were quantised.
        config.audio_config._name_or_path, config.text_config._name_or_path = audio_model_id, text_model_id
        if hasattr(config.text_config, "quantization_config"):
            del config.text_config.quantization_config
        model = cls(config, with_backbones=False)
        model.attach_backbones(audio_tower, language_model)
        model.generation_config = language_model.generation_config
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        config=None,
        dtype=None,
        device_map=None,
        quantization_config=None,
        attn_implementation=None,
        output_loading_info: bool = False,
        ears_only: bool = False,
        **kwargs,
    ):
        """Loads the adapters, then the backbones that the config names, and checks both.

        Args:
            dtype, device_map, max_memory, offload_folder, quantization_config, attn_implementation: for the backbones.
                The adapters are few and stay in float32.
            audio_model_id, text_model_id: load the same backbones from elsewhere. Where `text_model_id` names an LLM with
                another fingerprint, the adapters are ported: caption and lexicon are spelled in its tokens, what is
                bound to the old LLM is dropped, and a warning says so. Load the processor with the same `text_model_id`.
            ears_only: of the LLM, load the embedding matrix alone. Such a model hears, and does not generate.

        Raises:
            ValueError: keys are missing, unexpected or of another shape, a backbone is not the one trained with, or
                adapters that only their own LLM can read are to be ported.
            OSError: a file is damaged or missing or a pickle, or a backbone cannot be found.
        """
        name = pretrained_model_name_or_path
        hub_kwargs = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None}
        places = {key: kwargs[key] for key in ("revision", "subfolder") if kwargs.get(key) is not None}
        dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
        placing = {key: kwargs.pop(key, None) for key in ("max_memory", "offload_folder", "offload_buffers")}
        saved = None
        if not isinstance(config, PreTrainedConfig):
            source = config if config is not None else name
            with name_in_errors(source):
                saved = config = DualSLMConfig.from_pretrained(source, **hub_kwargs, **places)
        port = plan_port(name, saved, kwargs.get("text_model_id", config.text_model_id), hub_kwargs, places)
        if attn_implementation is None:  # the auto classes have moved it there; sdpa is the default
            found = getattr(config, "_attn_implementation", None)
            attn_implementation = None if found == "sdpa" else found
        for side in SIDES:
            if f"{side}_model_id" in kwargs:
                setattr(config, f"{side}_model_id", kwargs.pop(f"{side}_model_id"))
                setattr(config, f"{side}_model_revision", None)  # a commit of the other repository
            if getattr(config, f"{side}_model_id") is None:
                raise ValueError(
                    f"{name} names no {side}_model_id. A checkpoint of adapters must name its backbones: make the model "
                    f"by from_backbones, or pass {side}_model_id=... here."
                )
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError(
                "use_safetensors=False is refused: adapters are read from safetensors, never from pickles."
            )
        model, info = cls._load_adapters(name, config, kwargs)
        if port is not None:
            model = port.move(name, model, hub_kwargs)
            config = model.config
        options = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        options |= {"quantization_config": quantization_config, **placing, **hub_kwargs}
        sources = [BackboneSource.of(config, side) for side in SIDES]
        audio_tower, language_model, _ = load_backbones(sources[0], sources[1], options, ears_only)
        for side in SIDES:
            refuse_other_backbone(config, side, hub_kwargs)
        generation_config = (model if port is None or ears_only else language_model).generation_config
        model.attach_backbones(audio_tower, language_model, lora=not ears_only)  # LoRA is of the layers
        if config.lora_config is not None and not ears_only:
            load_lora(model, name, hub_kwargs | places)
        model.generation_config = generation_config
        model.eval()
        return (model, info) if output_loading_info else model

    @classmethod
    def _load_adapters(cls, name, config: PreTrainedConfig, kwargs: dict):
        """The adapters alone. Any other order lets transformers overwrite the backbones' buffers without a word."""
        try:
            loaded: Any = super().from_pretrained(
                name,
                False,  # with_backbones, by place: transformers writes keywords of a model into its generation config too
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # collected, and refused below with all of them named
                **kwargs,
            )
        except SafetensorError as error:
            raise OSError(
                f"model.safetensors of {name} is damaged or cut short ({error}). Download it again "
                "(force_download=True), or restore the file."
            ) from error
        model, info = loaded
        missing = set(info["missing_keys"])
        if config.caption_origin is not None and not model.paralinguistic_adapter.soft_tokens.keys.any():
            missing.add("paralinguistic_adapter.soft_tokens.keys")  # no LLM that is loaded here has them
        refuse_wrong_keys(name, missing, info["unexpected_keys"], info["mismatched_keys"])
        return model, info
