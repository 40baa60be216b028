"""Builds the model and the processor of a recipe: new adapters between its backbones, or those of a checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from ..backbones_dual_slm import resolve_backbone
from ..captions_dual_slm import CaptionSlots
from ..configuration_dual_slm import ALPHABET, EMOSLLM_ADAPTERS, WARM_START_ADAPTERS, DualSLMConfig
from ..modeling_dual_slm import DualSLMForConditionalGeneration
from ..processing_dual_slm import DualSLMProcessor
from .backbones import BACKBONES, fetch_backbone
from .files import read_json
from .forward import load_state
from .hardware import fast_dtype
from .labels import ATTRIBUTE_LABELS, CAPTION_TEMPLATE
from .prompts import PROMPTS
from .recipe import ModelRecipe, Recipe
from .spelling import read_linguistic_state


def adapter_defaults(model_args: ModelRecipe) -> dict[str, Any]:
    """Fields of the configuration that `model.adapters` stands for."""
    return dict({"warm_start": WARM_START_ADAPTERS, "emosllm": EMOSLLM_ADAPTERS}.get(model_args.adapters, {}))


def fit_dtype(recipe: Recipe) -> Recipe:
    """The recipe in float32 where it asks for bfloat16 on a CPU that is slow in it."""
    asked = recipe.train.bf16 or recipe.model.dtype == "bfloat16"
    if torch.cuda.is_available() or not asked or fast_dtype("bfloat16") == "bfloat16":
        return recipe
    return replace(recipe, model=replace(recipe.model, dtype="float32"), train=replace(recipe.train, bf16=False))


def make_model(recipe: Recipe) -> tuple[DualSLMForConditionalGeneration, DualSLMProcessor]:
    """The recipe's model with its processor: new adapters, or the checkpoint `model.start_from` as it is.

    Raises:
        ValueError: `model.config` beside `model.start_from`, or a caption that the tokenizer cannot spell.
    """
    args = recipe.model
    options: dict[str, Any] = {"dtype": None if args.dtype == "auto" else args.dtype}
    if args.load_in_4bit:
        kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": options["dtype"] or "float32"}  # as in QLoRA
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **kind)
    if args.start_from and args.config:
        raise ValueError(
            f"model.config has {', '.join(args.config)} beside model.start_from: the checkpoint has a config of its own. "
            "Set model.config={}."
        )
    if args.start_from:
        model: Any = DualSLMForConditionalGeneration.from_pretrained(args.start_from, **options)
        processor = DualSLMProcessor.from_pretrained(args.start_from)
    else:
        model, processor = _new_adapters(recipe, options)
    # In its first pass without gradients, bitsandbytes repacks 4-bit weights for a CPU kernel that has no gradient
    # (AVX512-BF16). After the first evaluation the adapters would learn from wrong ones.
    for module in model.language_model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, processor


def _new_adapters(recipe: Recipe, options: dict[str, Any]) -> tuple[DualSLMForConditionalGeneration, DualSLMProcessor]:
    args = recipe.model
    for name in (args.audio_model_id, args.text_model_id):
        if name in BACKBONES:
            fetch_backbone(name)
    tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(args.text_model_id))
    config, slots = _new_config(recipe, tokenizer)
    torch.manual_seed(recipe.train.seed)
    model = DualSLMForConditionalGeneration.from_backbones(
        args.audio_model_id, args.text_model_id, **options, **config | args.config
    )
    extractor = AutoFeatureExtractor.from_pretrained(resolve_backbone(args.audio_model_id))
    if slots is not None:
        model.paralinguistic_adapter.soft_tokens.choose(slots.token_ids, model.get_input_embeddings())
    return model, DualSLMProcessor.from_config(model.config, extractor, tokenizer)


def _new_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], CaptionSlots | None]:
    """Fields of the configuration that follow from `adapters`, and the caption that the adapter learns to spell."""
    args, config, slots = recipe.model, adapter_defaults(recipe.model), None
    emosllm = args.adapters == "emosllm"
    labels = {"emotion": ATTRIBUTE_LABELS["emotion"]} if emosllm else ATTRIBUTE_LABELS
    labels = args.config.get("attribute_labels", labels)
    template = args.config.get("caption_template", CAPTION_TEMPLATE if args.adapters == "warm_start" else None)
    if template is not None:
        if "Ġ" not in tokenizer.get_vocab():
            raise ValueError(
                f"the tokenizer of {args.text_model_id} is not a byte-level one, and model.adapters: warm_start and a "
                "caption_template need one to spell words. Take model.adapters: paper, or emosllm without a template."
            )
        slots = CaptionSlots(tokenizer, template, labels)
        config |= {"caption_template": template, "attribute_labels": labels}
        config["num_paralinguistic_tokens"] = slots.num_slots
        config["paralinguistic_soft_vocab_size"] = len(slots.token_ids)
    if emosllm:
        wording = PROMPTS["attributes"]
        questions = {
            name: {"instruction": wording[name]["instructions"][0], "answer": wording[name]["answers"][0]}
            for name in labels
        }
        config |= {"attribute_labels": labels, "attribute_questions": questions}
        config["prompt_facts"] = recipe.stages[-1].facts
    return config, slots


def check_stage_0(recipe: Recipe, config: DualSLMConfig) -> None:
    """Raises `ValueError` if stage 0 is enabled and the model's adapters cannot learn from it."""
    if not recipe.warm_start.enabled:
        return
    spells_captions = config.reads_statistics and config.paralinguistic_soft_vocab_size
    if recipe.warm_start.caption_steps and config.paralinguistic_adapter_type == "pooling" and not spells_captions:
        raise ValueError(
            "stage 0 teaches an adapter that reads statistics to say a caption: give a model.config.caption_template, "
            "paralinguistic_pooling: statistics and paralinguistic_num_layers: 0, or take paralinguistic_adapter_type: "
            "query, or leave stage 0 out by warm_start.enabled=false."
        )
    if config.linguistic_adapter_type == "concat":
        raise ValueError(
            "linguistic_adapter_type is concat, the paper's, which learns through the LLM alone: stage 0 teaches letters. "
            "Take linguistic_adapter_type: letters, or leave stage 0 out by warm_start.enabled=false."
        )


def take_linguistic(model: DualSLMForConditionalGeneration, checkpoint: Path) -> None:
    """Loads the character CTC adapter of a checkpoint, with its lexicon, into the model.

    The adapter depends on the speech encoder alone. Stage 0 spells the lexicon anew in the tokens of the model's LLM.
    Another encoder, alphabet or shape is a ValueError.
    """
    state = read_linguistic_state(checkpoint / "model.safetensors")
    config, adapter = read_json(checkpoint / "config.json"), model.linguistic_adapter
    if config["audio_model_fingerprint"] != model.config.audio_model_fingerprint:
        raise ValueError(f"warm_start.linguistic_from: {checkpoint} was trained with another audio backbone.")
    letters = config.get("linguistic_letters", ALPHABET)
    if letters != model.config.linguistic_letters:
        raise ValueError(f"warm_start.linguistic_from: {checkpoint} writes in other letters, {letters!r}.")
    buffers = dict(adapter.named_buffers())  # words and bigrams: as many as there were
    known = {name: tensor.shape for name, tensor in adapter.state_dict().items()}
    wrong = [name for name, tensor in state.items() if known.get(name) != tensor.shape and name not in buffers]
    wrong += [name for name in known if name not in state]
    if wrong:
        raise ValueError(f"warm_start.linguistic_from: {checkpoint} does not fit the recipe in {', '.join(wrong)}.")
    load_state(adapter, state)
