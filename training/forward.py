"""The model's pass in training: cached encoder features, gradients where an adapter learns, logits at targets alone.

Shapes: B rows, S tokens, A audio clips, L encoder layers read, T encoder frames, C the encoder's width.
"""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..modeling_dual_slm import DualSLMAudioFeatures, DualSLMForConditionalGeneration
from .hardware import is_sharded

_SHORTEST_PREFIX = 8  # positions; a shorter prefix does not pay for a pass of its own


class TargetOutput(NamedTuple):
    """What training needs of a batch, and no more."""

    logits: Tensor  # (N, V), one for each of the N targets: they predict `labels[labels != -100]`
    labels: Tensor  # (B, K) of the last K positions, -100 where there is no target
    audio_features: DualSLMAudioFeatures | None  # what the adapters made of the clips
    num_positions: int  # real positions that the LLM computed
    num_constant_positions: int  # those of them before the speech, which need no backward pass

    def target_log_probs(self) -> Tensor:
        """(B, K), the log-probability of each target; 0 where there is none."""
        known = self.labels != -100
        log_probs = self.logits.float().log_softmax(-1).gather(-1, self.labels[known][:, None])[:, 0]
        return log_probs.new_zeros(known.shape).masked_scatter(known, log_probs)


def adapt_cached(
    model: DualSLMForConditionalGeneration,
    audio_states: Tensor,
    audio_lengths: Tensor,
    audio_branches: Tensor,
    audio_pooled: Tensor | None = None,
    audio_trained: Tensor | None = None,
) -> DualSLMAudioFeatures:
    """`adapt_audio` on cached features, with gradients only for the clips that an adapter learns from.

    Args:
        audio_states, audio_lengths, audio_branches: (A, L, T, C), (A,) and (A, 2), see `adapt_audio`.
        audio_pooled: (A, ...), what `ParalinguisticAdapter.pool` returned, which replaces the states.
        audio_trained: (A, 2), whether each adapter learns from each clip (ERR). Default: both do.
    """
    embedding, voice, words = model.get_input_embeddings(), model.paralinguistic_adapter, model.linguistic_adapter
    weight = voice.output.weight
    states, lengths = audio_states.to(weight), audio_lengths.to(weight.device)
    hears_voice, hears_words = audio_branches.to(weight.device).bool().unbind(-1)
    learns = torch.ones_like(audio_branches) if audio_trained is None or not torch.is_grad_enabled() else audio_trained
    learns_voice, learns_words = learns.to(weight.device).bool().unbind(-1)
    features = DualSLMAudioFeatures()
    if hears_voice.any():
        pooled = None if audio_pooled is None else audio_pooled.to(states)

        def adapt_voice(chosen: Tensor) -> Iterable[tuple]:
            if pooled is None:
                embeds, logits = voice(states[chosen], lengths[chosen], embedding)
            else:
                embeds, logits = voice.embed(pooled[chosen], embedding)
            return zip(embeds, [None] * len(embeds) if logits is None else logits, strict=True)

        embeds, logits = _adapt_clips(voice, hears_voice, learns_voice, adapt_voice)
        features.paralinguistic_embeds = torch.stack(embeds)
        features.paralinguistic_logits = None if logits[0] is None else torch.stack(logits)
    if hears_words.any():

        def adapt_words(chosen: Tensor) -> Iterable[tuple]:
            embeds, counts, tokens = words(states[chosen][:, -1], lengths[chosen], embedding)
            sizes = counts.tolist()
            ids = [None] * len(sizes) if tokens is None else tokens.split(sizes)
            return zip(embeds.split(sizes), counts, ids, strict=True)

        embeds, counts, tokens = _adapt_clips(words, hears_words, learns_words, adapt_words)
        features.linguistic_embeds, features.linguistic_lengths = torch.cat(embeds), torch.stack(counts)
        features.linguistic_placeholders = words.output_lengths(lengths[hears_words])
        features.linguistic_token_ids = None if tokens[0] is None else torch.cat(tokens)
    return features


def _adapt_clips(
    adapter: nn.Module, heard: Tensor, learns: Tensor, adapt: Callable[[Tensor], Iterable[tuple]]
) -> list[tuple]:
    """Outputs of the clips that are heard, in their order, each kind of output by itself.

    ERR freezes an adapter for single samples (section III-C). Their clips run apart: without gradients, activations
    and dropout.
    """
    clips: dict[int, tuple] = {}
    for chosen, frozen in ((heard & learns, False), (heard & ~learns, True)):
        if chosen.any():
            training = adapter.training
            adapter.train(training and not frozen)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                clips.update(zip(chosen.nonzero()[:, 0].tolist(), adapt(chosen), strict=True))
            adapter.train(training)
    return list(zip(*(clips[place] for place in sorted(clips)), strict=True))


def forward_targets(
    model: DualSLMForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    audio_features: DualSLMAudioFeatures | None = None,
    **cached: Tensor,
) -> TargetOutput:
    """The loss mask's logits: drops masked positions before the LLM runs, and computes logits of the targets alone.

    Args:
        input_ids, attention_mask, labels: (B, S), labels -100 outside the targets.
        audio_features: of all clips; else `cached` has the arguments of [`adapt_cached`].
    """
    if audio_features is None and "audio_states" in cached:
        audio_features = adapt_cached(model, **cached)
    _, embeds, mask, packed = model.pack_prompt(input_ids, attention_mask, audio_features, labels)
    assert packed is not None
    if is_sharded(model) and torch.is_grad_enabled() and not embeds.requires_grad:
        embeds.requires_grad_()  # a batch without speech; other processes go backward and wait for its layers
    keep = packed.shape[1] - int((packed != -100).any(0).nonzero().min())  # from the first target on
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    prefix, cache = _constant_prefix(model, input_ids, attention_mask, mask, keep), None
    if prefix:
        with torch.no_grad():
            cache = model.get_decoder()(
                inputs_embeds=embeds[:, :prefix],
                attention_mask=mask[:, :prefix],
                position_ids=positions[:, :prefix],
                use_cache=True,
            ).past_key_values
    # Of the kept positions the output matrix reads only those that predict a target.
    known = packed[:, -keep:] != -100
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :-1][known],))
    try:
        outputs = model.language_model(
            inputs_embeds=embeds[:, prefix:],
            attention_mask=mask,
            position_ids=positions[:, prefix:],
            past_key_values=cache,
            logits_to_keep=keep + 1,  # one position earlier predicts the first target
            use_cache=cache is not None,
        )
    finally:
        hook.remove()
    num_positions, num_constant = int(mask.sum()), int(mask[:, :prefix].sum())
    return TargetOutput(outputs.logits, packed[:, -keep:], audio_features, num_positions, num_constant)


def _constant_prefix(
    model: DualSLMForConditionalGeneration, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, keep: int
) -> int:
    """Columns of a packed batch before the first speech of any row: system prompt and history.

    They do not depend on the adapters, so they need no backward pass, which is half of their cost. LoRA, activation
    checkpointing and sharded layers need one pass for all columns.
    """
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.language_model.modules())
    if not torch.is_grad_enabled() or is_sharded(model) or model.config.lora_config is not None or checkpointed:
        return 0
    paralinguistic_mask, linguistic_mask = model.placeholder_masks(input_ids)
    before = (attention_mask.bool() & ((paralinguistic_mask | linguistic_mask).cumsum(-1) == 0)).sum(-1)
    start = min(int((mask.shape[1] - mask.sum(-1) + before).min()), mask.shape[1] - keep - 1)
    return start if start >= _SHORTEST_PREFIX else 0


def accept_targets(model: DualSLMForConditionalGeneration) -> None:
    """Lets `model(**batch, only_targets=True)` run [`forward_targets`], through DDP too, if accelerate wraps it later."""
    usual = type(model).forward

    def forward(self, *args, only_targets: bool = False, **kwargs):
        return forward_targets(self, **kwargs) if only_targets else usual(self, *args, **kwargs)

    model.forward = MethodType(forward, model)


def load_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads tensors into a module that may lack some of them; a buffer takes the new tensor's size (tokens, lexicon)."""
    buffers = dict(module.named_buffers())
    for name in state.keys() & buffers.keys():
        place, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(place), leaf, state[name].to(buffers[name].device))
    module.load_state_dict(state, strict=False)
