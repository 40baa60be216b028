"""A frozen speech encoder and a frozen LLM, joined by a paralinguistic and a linguistic adapter (arXiv 2508.08095).

Shapes: B rows, S tokens, A audio clips, K chunks of at most 30 s, F mel frames (100 Hz), T encoder frames (50 Hz),
L encoder layers read, C the encoder's width, N `num_paralinguistic_tokens`, D the LLM's width.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.utils.generic import ModelOutput

from .adapters_dual_slm import LinguisticAdapter, ParalinguisticAdapter, QueryAdapter
from .configuration_dual_slm import DualSLMConfig
from .encoder_dual_slm import encode_speech
from .letters_dual_slm import LetterAdapter
from .lora_dual_slm import add_lora
from .pretrained_dual_slm import DualSLMPreTrainedModel

AUDIO_INPUTS = ("input_features", "input_features_mask", "audio_num_chunks", "audio_branches", "audio_features")


@dataclass
class DualSLMAudioFeatures(ModelOutput):
    """What the adapters make of A clips. The paralinguistic branch hears P of them, the linguistic one Q.

    Args:
        paralinguistic_embeds: (P, N, D).
        paralinguistic_logits: (P, N, V) over caption tokens, if the adapter has soft tokens.
        linguistic_embeds: (M, D), all clips one after the other.
        linguistic_lengths: (Q,), embeddings of each clip; they add up to M.
        linguistic_placeholders: (Q,), placeholders that the processor gave each clip. Character CTC needs fewer.
        linguistic_token_ids: (M,), the LLM's token of each embedding, with character CTC.
    """

    paralinguistic_embeds: torch.Tensor | None = None
    paralinguistic_logits: torch.Tensor | None = None
    linguistic_embeds: torch.Tensor | None = None
    linguistic_lengths: torch.Tensor | None = None
    linguistic_placeholders: torch.Tensor | None = None
    linguistic_token_ids: torch.Tensor | None = None

    @classmethod
    def concatenate(cls, parts: list["DualSLMAudioFeatures"]) -> "DualSLMAudioFeatures":
        """The features of several turns as those of one input."""
        values = {}
        for name in (f.name for f in fields(cls)):
            tensors = [getattr(part, name) for part in parts if getattr(part, name) is not None]
            values[name] = torch.cat(tensors) if tensors else None
        return cls(**values)


class PackedPrompt(NamedTuple):
    """A prompt with its real positions at the right: (B, S'), the embeddings (B, S', D).

    The placeholders are token 0 in `input_ids`, which only logits processors read.
    """

    input_ids: torch.Tensor
    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor | None = None


class DualSLMForConditionalGeneration(DualSLMPreTrainedModel, GenerationMixin):
    """A frozen speech encoder and a frozen LLM joined by two adapters; only the adapters are trained and saved.

    Without audio it is the LLM, bit for bit.
    """

    def __init__(self, config: DualSLMConfig, with_backbones: bool = True):
        super().__init__(config)
        self.audio_tower = self.language_model = None
        kind = QueryAdapter if config.paralinguistic_adapter_type == "query" else ParalinguisticAdapter
        self.paralinguistic_adapter = kind(config)
        kind = LetterAdapter if config.linguistic_adapter_type == "letters" else LinguisticAdapter
        self.linguistic_adapter = None if config.linguistic_adapter_type == "none" else kind(config)
        if with_backbones:
            audio_tower = AutoModel.from_config(config.audio_config)
            self.audio_tower = audio_tower.get_encoder() if config.audio_config.is_encoder_decoder else audio_tower
            self.language_model = AutoModelForCausalLM.from_config(config.text_config)
            self._freeze_backbones()
            add_lora(self.language_model, config.lora_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_decoder(self):
        return self.language_model.get_decoder()

    # ---- audio -----------------------------------------------------------------------------------------------------

    def encode_audio(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        audio_num_chunks: torch.Tensor | None = None,
        all_layers: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The frozen encoder's real frames, see [`encode_speech`].

        Args:
            all_layers: return every layer, or the last alone. Default: what the paralinguistic adapter reads.

        Returns:
            (A, L, T, C) float32 states of the encoder's layers, zero past the end, and (A,) real frames of each clip.
        """
        return encode_speech(
            self.audio_tower,
            input_features,
            input_features_mask,
            audio_num_chunks,
            real_length=self.config.encoder_padding == "real",
            all_layers=self.config.paralinguistic_layer_mix if all_layers is None else all_layers,
        )

    def adapt_audio(
        self, states: torch.Tensor, lengths: torch.Tensor, audio_branches: torch.Tensor | None = None
    ) -> DualSLMAudioFeatures:
        """The two adapters on the encoder's states.

        Args:
            states, lengths: (A, L, T, C) and (A,), see `encode_audio`.
            audio_branches: (A, 2), whether the paralinguistic and the linguistic branch hear each clip. Default: both do.
        """
        embedding, weight = self.get_input_embeddings(), self.paralinguistic_adapter.output.weight
        # Adapters that were cast with the whole model (`.half()`) read their own dtype.
        states, lengths = states.to(weight), lengths.to(weight.device)
        if audio_branches is None:
            audio_branches = torch.ones(len(lengths), 2)
        hears_voice, hears_words = audio_branches.to(weight.device).bool().unbind(-1)
        features = DualSLMAudioFeatures()
        if hears_voice.any():
            embeds, logits = self.paralinguistic_adapter(states[hears_voice], lengths[hears_voice], embedding)
            features.paralinguistic_embeds, features.paralinguistic_logits = embeds, logits
        if hears_words.any():
            if self.linguistic_adapter is None:
                raise ValueError(
                    "this checkpoint has no linguistic adapter: give the words as text, linguistic: transcript or none."
                )
            lengths = lengths[hears_words]
            embeds, counts, token_ids = self.linguistic_adapter(states[hears_words][:, -1], lengths, embedding)
            features.linguistic_embeds, features.linguistic_lengths = embeds, counts
            features.linguistic_placeholders = self.linguistic_adapter.output_lengths(lengths)
            features.linguistic_token_ids = token_ids
        return features

    def get_audio_features(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        audio_num_chunks: torch.Tensor | None = None,
        audio_branches: torch.Tensor | None = None,
    ) -> DualSLMAudioFeatures:
        """Encoder and adapters, see `encode_audio` and `adapt_audio`."""
        states, lengths = self.encode_audio(input_features, input_features_mask, audio_num_chunks)
        return self.adapt_audio(states, lengths, audio_branches)

    def placeholder_masks(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S), true at the paralinguistic and at the linguistic placeholders."""
        return input_ids == self.config.paralinguistic_token_id, input_ids == self.config.linguistic_token_id

    def merge_audio(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, audio: DualSLMAudioFeatures | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeds a prompt and replaces its placeholders by the adapters' outputs.

        Character CTC leaves fewer embeddings than the processor reserved; the surplus is masked out.

        Args:
            input_ids: (B, S) with placeholders.
            attention_mask: (B, S). Default: all real.

        Returns:
            (B, S, D) embeddings and (B, S) attention mask.

        Raises:
            ValueError: the prompt has more or fewer placeholders than the audio needs.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        audio = audio or DualSLMAudioFeatures()
        paralinguistic_mask, linguistic_mask = self.placeholder_masks(input_ids)
        voices, slots = audio.paralinguistic_embeds, audio.linguistic_placeholders
        _check_placeholders("paralinguistic", paralinguistic_mask, 0 if voices is None else voices.shape[:2].numel())
        _check_placeholders("linguistic", linguistic_mask, 0 if slots is None else int(slots.sum()))
        embeds = self.get_input_embeddings()(input_ids.masked_fill(paralinguistic_mask | linguistic_mask, 0))
        if voices is not None:
            embeds = embeds.masked_scatter(paralinguistic_mask[..., None], voices.flatten(0, 1).to(embeds))
        if slots is not None and audio.linguistic_lengths is not None and audio.linguistic_embeds is not None:
            device = linguistic_mask.device
            pairs = zip(slots.tolist(), audio.linguistic_lengths, strict=True)
            kept = linguistic_mask.clone()
            kept[linguistic_mask] = torch.cat([torch.arange(size, device=device) < length for size, length in pairs])
            embeds = embeds.masked_scatter(kept[..., None], audio.linguistic_embeds.to(embeds))
            attention_mask = attention_mask.masked_fill(linguistic_mask & ~kept, 0)
        return embeds, attention_mask

    def pack_prompt(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        audio: DualSLMAudioFeatures | None,
        labels: torch.Tensor | None = None,
    ) -> PackedPrompt:
        """Embeds a prompt and moves its real positions to the right, so that masked ones cost nothing."""
        embeds, attention_mask = self.merge_audio(input_ids, attention_mask, audio)
        length = int(attention_mask.sum(-1).max())
        order = attention_mask.argsort(dim=-1, stable=True)[:, -length:]
        paralinguistic_mask, linguistic_mask = self.placeholder_masks(input_ids)
        return PackedPrompt(
            input_ids.masked_fill(paralinguistic_mask | linguistic_mask, 0).gather(1, order),
            embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1])),
            attention_mask.gather(1, order),
            None if labels is None else labels.gather(1, order),
        )

    def _refuse_unheard(self, input_ids: torch.Tensor) -> None:
        """Refuses placeholders without audio: the LLM has no such tokens, or untrained ones."""
        for branch, mask in zip(("paralinguistic", "linguistic"), self.placeholder_masks(input_ids), strict=True):
            _check_placeholders(branch, mask, 0)

    # ---- language --------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        audio_num_chunks: torch.Tensor | None = None,
        audio_branches: torch.Tensor | None = None,
        audio_features: DualSLMAudioFeatures | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ):
        """
        Args:
            input_ids: (B, S), with the placeholders that the processor wrote.
            input_features, input_features_mask, audio_num_chunks, audio_branches: all clips of the batch, in the order of
                their placeholders; see `get_audio_features`.
            audio_features: replaces them by what `get_audio_features` returned.
            attention_mask, position_ids, inputs_embeds, labels, kwargs: as for the LLM.

        Returns:
            `CausalLMOutputWithPast` of the LLM.
        """
        if audio_features is None and input_features is not None:
            audio_features = self.get_audio_features(
                input_features, input_features_mask, audio_num_chunks, audio_branches
            )
        if audio_features is not None:
            if input_ids is None:
                raise ValueError("audio needs input_ids, whose placeholders say where it goes; got none.")
            inputs_embeds, attention_mask = self.merge_audio(input_ids, attention_mask, audio_features)
            input_ids = None
            if position_ids is None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        elif input_ids is not None and input_ids.shape[1] > 1:  # not for each token that is generated
            self._refuse_unheard(input_ids)
        return self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            **kwargs,
        )

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, **kwargs):
        """`GenerationMixin.generate` with audio: the arguments of `forward`, and every option of generation.

        Audio is encoded once, before generation. The prompt is packed, so that unused placeholders and padding between
        turns cost nothing. The returned sequences begin with the prompt as it was given. With `past_key_values`, the
        part of the packed prompt that the cache holds is not computed again.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        audio = {name: kwargs.pop(name, None) for name in AUDIO_INPUTS}
        features = audio.pop("audio_features")
        if features is None and audio["input_features"] is not None:
            features = self.get_audio_features(**audio)
        if features is None:
            if input_ids is not None:
                self._refuse_unheard(input_ids)
            return super().generate(input_ids, **kwargs)  # pyright: ignore
        if input_ids is None:
            raise ValueError("audio needs input_ids, whose placeholders say where it goes; got none.")
        packed = self.pack_prompt(input_ids, kwargs.pop("attention_mask", None), features)
        inputs_kwargs = {"inputs_embeds": packed.inputs_embeds, "attention_mask": packed.attention_mask}
        output = super().generate(packed.input_ids, **inputs_kwargs, **kwargs)  # pyright: ignore
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        copies = len(sequences) // len(input_ids)
        prompt = input_ids.to(sequences.device).repeat_interleave(copies, dim=0)
        sequences = torch.cat([prompt, sequences[:, packed.input_ids.shape[1] :]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    @torch.no_grad()
    def answer_log_probs(
        self,
        input_ids: torch.Tensor,
        answers: list[torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        audio_features: DualSLMAudioFeatures | None = None,
    ) -> torch.Tensor:
        """Log-probability of each of several answers to one prompt, which is read once.

        Args:
            input_ids: (1, S) with placeholders.
            answers: token ids of each answer.
            audio_features: of the prompt's clips.

        Returns:
            (answers,), each summed over its tokens, float32.
        """
        prompt = self.pack_prompt(input_ids, attention_mask, audio_features)
        rows = nn.utils.rnn.pad_sequence(answers, batch_first=True).to(input_ids.device)
        real = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in answers], batch_first=True).to(rows.device)
        read = self.language_model(
            inputs_embeds=prompt.inputs_embeds, attention_mask=prompt.attention_mask, logits_to_keep=1, use_cache=True
        )
        read.past_key_values.batch_repeat_interleave(len(rows))
        behind = self.language_model(
            input_ids=rows,
            attention_mask=torch.cat([prompt.attention_mask.expand(len(rows), -1), real], dim=1),
            past_key_values=read.past_key_values,
        )
        logits = torch.cat([read.logits.expand(len(rows), -1, -1), behind.logits[:, :-1]], dim=1)
        return (logits.float().log_softmax(-1).gather(-1, rows[..., None])[..., 0] * real).sum(-1)


def _check_placeholders(branch: str, mask: torch.Tensor, needed: int) -> None:
    found = int(mask.sum())
    if found != needed:
        raise ValueError(
            f"the prompt has {found} {branch} placeholders, its audio needs {needed}. Let the processor of this "
            "checkpoint write them (apply_chat_template), and do not truncate the prompt."
        )


DualSLMForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")

__all__ = ["DualSLMAudioFeatures", "DualSLMForConditionalGeneration"]
