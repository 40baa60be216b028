"""Moves the ears of a checkpoint to another LLM without training: caption and lexicon are spelled anew."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

from .backbones_dual_slm import (
    BackboneSource,
    name_in_errors,
    refuse_other_backbone,
    resolve_backbone,
    resolve_commit,
)
from .captions_dual_slm import CaptionSlots
from .configuration_dual_slm import DualSLMConfig
from .letters_dual_slm import lexicon_rows

logger = logging.get_logger(__name__)

_SOFT, _LEXICON = "paralinguistic_adapter.soft_tokens.", "linguistic_adapter.lexicon."
_OF_THE_LLM = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass
class Port:
    """A checkpoint's way to another LLM.

    Args:
        old: the checkpoint's config.
        config: the config with the other LLM.
        tokenizer: the other LLM's.
        slots: the caption in its tokens.
        heard: the caption in the tokens that the adapter learned, by the config's `caption_origin`.
        dropped: what was bound to the old LLM.
    """

    old: DualSLMConfig
    config: DualSLMConfig
    tokenizer: Any
    slots: CaptionSlots
    heard: CaptionSlots
    dropped: list[str]

    @classmethod
    def plan(cls, name, old: DualSLMConfig, text: BackboneSource, hub_kwargs: dict, places: dict) -> "Port | None":
        """See [`plan_port`]; `old` is the checkpoint's config as it was saved, `text` the LLM that was asked for."""
        found = text.fingerprint(**hub_kwargs)
        if found == old.text_model_fingerprint:
            return None
        _refuse_bound(name, old, text.model_id)
        with name_in_errors(text.model_id):
            place = resolve_backbone(text.model_id)
            tokenizer = AutoTokenizer.from_pretrained(place, revision=text.revision, **hub_kwargs)
            text_config = AutoConfig.from_pretrained(place, revision=text.revision, **hub_kwargs)
        template, labels = str(old.caption_template), old.attribute_labels or {}
        slots = CaptionSlots(tokenizer, template, labels)
        origin = old.caption_origin or _describe_origin(name, old, hub_kwargs, places)
        home = found == origin["text_model_fingerprint"] and slots.layout() == origin["slots"]
        changes: dict[str, Any] = {
            "text_config": text_config.get_text_config(decoder=True).to_dict() | {"_name_or_path": text.model_id},
            "text_model_id": text.model_id,
            "text_model_revision": text.revision,
            "text_model_fingerprint": found,
            "paralinguistic_token_id": len(tokenizer),
            "linguistic_token_id": len(tokenizer) + 1,
            "num_paralinguistic_tokens": slots.num_slots,
            "caption_origin": None if home else origin,
            "lora_config": None,
            "attribute_questions": None,
        }
        changes["text_config"].pop("quantization_config", None)
        kept = {key: value for key, value in old.to_dict().items() if key not in _OF_THE_LLM}
        config = type(old).from_dict(kept | changes)
        heard = slots if home else CaptionSlots.from_layout(origin["slots"], labels)
        return cls(old, config, tokenizer, slots, heard, _list_bound(old))

    def move(self, name, model: Any, hub_kwargs: dict[str, Any]) -> Any:
        """The adapters of `model`, which has no backbones, for the other LLM."""
        state = {key: tensor for key, tensor in model.state_dict().items() if ".residual." not in key}
        config = self.config
        if config.linguistic_adapter_type == "letters":
            alphabet = config.linguistic_letters
            words, bigrams = model.linguistic_adapter.lexicon.known(alphabet)
            rows = lexicon_rows(self.tokenizer, words, bigrams, alphabet)
            config.linguistic_lexicon_size, config.linguistic_lexicon_pairs = len(rows["counts"]), len(rows["pairs"])
            state |= {f"{_LEXICON}{key}": tensor for key, tensor in rows.items()}
        if not state[f"{_SOFT}keys"].any():
            state[f"{_SOFT}keys"] = _read_keys(name, model, self.old, hub_kwargs)
        state.pop(f"{_SOFT}sources", None)
        state[f"{_SOFT}token_ids"] = torch.tensor(self.slots.token_ids)
        if config.caption_origin is not None:
            state[f"{_SOFT}token_ids"] = self.slots.label_tokens()
            state[f"{_SOFT}sources"] = torch.tensor(self.heard.nearest(self.slots))
        moved = type(model)(config, False)
        wrong = moved.load_state_dict(state, strict=False)
        left = [key for key in wrong.missing_keys if ".residual." not in key] + wrong.unexpected_keys
        if left:
            raise ValueError(f"{name} has tensors that cannot be ported to {config.text_model_id}: {', '.join(left)}.")
        dropped = f" Dropped, as it is bound to the old LLM: {', '.join(self.dropped)}." if self.dropped else ""
        logger.warning(f"{name} was ported from {self.old.text_model_id} to {config.text_model_id}.{dropped}")
        return moved


def plan_port(
    name, saved: DualSLMConfig | None, text_model_id: str | None, hub_kwargs: dict[str, Any], places: dict[str, Any]
) -> Port | None:
    """How the checkpoint `name` gets to another LLM.

    Args:
        saved: the checkpoint's config as it was saved; without it, it is read from `name`.
        text_model_id: the LLM that was asked for.
        hub_kwargs, places: Hub options; `revision` and `subfolder` of the checkpoint.

    Returns:
        `None` where no other LLM was asked for: the same name, or the same fingerprint in another place.

    Raises:
        ValueError: adapters that only their own LLM can read.
    """
    if saved is None:  # the auto classes have written `text_model_id` into the config that they pass on
        try:
            saved = DualSLMConfig.from_pretrained(name, **hub_kwargs, **places)
        except OSError:  # a folder of tensors alone
            return None
    if text_model_id in (None, saved.text_model_id) or saved.text_model_fingerprint is None:
        return None
    text = BackboneSource(str(text_model_id), resolve_commit(str(text_model_id), None, **hub_kwargs))
    return Port.plan(name, copy.deepcopy(saved), text, hub_kwargs, places)


def _refuse_bound(name, config: DualSLMConfig, text_model_id: str) -> None:
    """Refuses adapters whose outputs are free vectors, which no other LLM can read."""
    free = []
    if config.paralinguistic_adapter_type == "query":
        free.append("the query adapter of its paralinguistic branch")
    elif config.caption_template is None or not config.paralinguistic_soft_vocab_size:
        free.append("its paralinguistic adapter, which spells no caption,")
    if config.linguistic_adapter_type == "concat":
        free.append("its linguistic adapter, which writes no letters,")
    if free:
        raise ValueError(
            f"{name} cannot be ported to {text_model_id}: {' and '.join(free)} gives vectors that only "
            f"{config.text_model_id} learned to read. Port a checkpoint with caption_template and "
            "linguistic_adapter_type: letters, or train new adapters with from_backbones."
        )


def _list_bound(config: DualSLMConfig) -> list[str]:
    bound = {
        "the free vectors beside the soft tokens, which start again at zero": config.paralinguistic_soft_residual,
        "LoRA": config.lora_config,
        "attribute_questions": config.attribute_questions,
        "generation_config (the new LLM's holds)": True,
    }
    return [what for what, there in bound.items() if there]


def _describe_origin(name, config: DualSLMConfig, hub_kwargs: dict, places: dict) -> dict[str, Any]:
    """`caption_origin` of a checkpoint that is with its first LLM, by the tokenizer that was saved with it."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub_kwargs, **places)
    except (OSError, ValueError):  # the model alone was saved
        source = BackboneSource.of(config, "text")
        with name_in_errors(source.model_id):
            place = resolve_backbone(str(source.model_id))
            tokenizer = AutoTokenizer.from_pretrained(place, revision=source.revision, **hub_kwargs)
    slots = CaptionSlots(tokenizer, str(config.caption_template), config.attribute_labels or {})
    if (slots.num_slots, len(slots.token_ids)) != (
        config.num_paralinguistic_tokens,
        config.paralinguistic_soft_vocab_size,
    ):
        raise ValueError(
            f"{name} cannot be ported: its tokenizer spells the caption in {slots.num_slots} slots of "
            f"{len(slots.token_ids)} tokens, its config has {config.num_paralinguistic_tokens} of "
            f"{config.paralinguistic_soft_vocab_size}. Restore the tokenizer that was saved with it."
        )
    return {
        "text_model_id": config.text_model_id,
        "text_model_fingerprint": config.text_model_fingerprint,
        "num_tokens": slots.num_slots,
        "hidden_size": config.text_config.hidden_size,
        "slots": slots.layout(),
    }


def _read_keys(name, model: Any, config: PreTrainedConfig, hub_kwargs: dict[str, Any]) -> torch.Tensor:
    """The old LLM's embedding rows of its caption tokens, for a checkpoint that was saved without them."""
    source = BackboneSource.of(config, "text")
    try:
        refuse_other_backbone(config, "text", hub_kwargs)
        place = resolve_backbone(str(source.model_id))
        options: dict[str, Any] = {"revision": source.revision, "dtype": "auto", "use_safetensors": True}
        old = AutoModelForCausalLM.from_pretrained(place, **options, **hub_kwargs)
    except OSError as error:
        raise OSError(
            f"{name} was saved without the embedding rows that it hears with, and {source.model_id}, which has them, "
            f"cannot be read: {error}"
        ) from error
    return model.paralinguistic_adapter.soft_tokens.rows(old.get_input_embeddings())
