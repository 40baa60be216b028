"""The frozen speech encoder at the clip's real length, masked, with the chunks of a clip joined.

Shapes: K chunks of at most 30 s, F mel frames (100 Hz) or samples, A clips, T encoder frames (50 Hz), L layers, C width.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

GROUP_CHUNKS = 8  # of a long clip, encoded together: 4 minutes


def length_mask(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """(A,) -> (A, size), true at real positions."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def encode_speech(
    tower: PreTrainedModel,
    input_features: torch.Tensor,
    input_features_mask: torch.Tensor | None = None,
    audio_num_chunks: torch.Tensor | None = None,
    real_length: bool = True,
    all_layers: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the encoder without gradients and keeps its real frames.

    Args:
        tower: a Whisper encoder, or an encoder of waveforms (WavLM, HuBERT, wav2vec 2.0).
        input_features: (K, mel bins, F) log-mel of a Whisper; (K, samples) of an encoder that reads waveforms.
        input_features_mask: (K, F) or (K, samples), 1 where real. Default: all real.
        audio_num_chunks: (A,), chunks of each clip; they add up to K. Default: one each.
        real_length: encode a Whisper's clip at its real length with a mask; else padded to 30 s.
        all_layers: return every layer, else the last alone.

    Returns:
        (A, L, T, C) float32 states of the encoder's layers, zero past the end, and (A,) real frames of each clip.

    Raises:
        ValueError: the chunks do not add up, or have another length than the encoder takes.
    """
    if input_features_mask is None:
        input_features_mask = input_features.new_ones(input_features.shape[0], input_features.shape[-1])
    mel_lengths = input_features_mask.to(next(tower.parameters()).device).sum(-1).long()
    counts = [1] * len(mel_lengths) if audio_num_chunks is None else audio_num_chunks.tolist()
    size = GROUP_CHUNKS if max(counts) > GROUP_CHUNKS else len(mel_lengths)
    parts = [
        _encode_group(tower, features, lengths, real_length, all_layers)
        for features, lengths in zip(input_features.split(size), mel_lengths.split(size), strict=True)
    ]
    states, lengths = parts[0] if len(parts) == 1 else _stack_groups(parts)
    if sum(counts) != len(lengths):
        raise ValueError(f"audio_num_chunks adds up to {sum(counts)}, but there are {len(lengths)} chunks.")
    if max(counts) > 1:
        states, lengths = _join_chunks(states, lengths, counts)
    else:
        states = states[:, :, : int(lengths.max())]
    real = length_mask(lengths, states.shape[2])[:, None, :, None]
    return states.float().masked_fill(~real, 0.0), lengths


@torch.no_grad()
def _encode_group(
    tower: Any, features: torch.Tensor, lengths: torch.Tensor, real_length: bool, all_layers: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks that the encoder reads at once: (K, mel, F) or (K, samples), (K,) -> (K, L, T, C), (K,) encoder frames."""
    parameter = next(tower.parameters())
    features = features.to(parameter.device, parameter.dtype)
    if tower.config.model_type == "whisper":
        return _encode_whisper(tower, features, lengths, real_length, all_layers)
    return _encode_waveform(tower, features, lengths, all_layers)


def _stack_groups(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The groups as one, padded to the longest chunk. Each group is freed as soon as it is copied."""
    lengths, first = torch.cat([lengths for _, lengths in parts]), parts[0][0]
    states, row = first.new_zeros(len(lengths), first.shape[1], int(lengths.max()), first.shape[3]), 0
    while parts:
        group, _ = parts.pop(0)
        states[row : row + len(group), :, : group.shape[2]] = group[:, :, : states.shape[2]]
        row += len(group)
    return states, lengths


def _encode_whisper(
    encoder: Any, features: torch.Tensor, mel_lengths: torch.Tensor, real_length: bool, all_layers: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whisper layer by layer, since transformers' own forward takes 30 s only and ignores a mask.

    (K, mel, F), (K,) mel frames -> (K, L, T, C), (K,) encoder frames.
    """
    limit = 2 * encoder.config.max_source_positions
    if features.shape[-1] > limit:
        raise ValueError(f"a chunk has {features.shape[-1]} mel frames; the encoder takes {limit} (30 s) at most.")
    mask, lengths = None, (mel_lengths + 1) // 2
    if real_length:
        # Zero where a clip alone would have the convolution's own zero padding: batches equal single runs.
        real = length_mask(mel_lengths, features.shape[-1]).to(features.dtype)[:, None]
        states = nn.functional.gelu(encoder.conv1(features * real)) * real
        states = nn.functional.gelu(encoder.conv2(states)).transpose(1, 2)
        mask = length_mask(lengths, states.shape[1])
    else:
        if features.shape[-1] != limit:
            raise ValueError(
                f"this checkpoint encodes clips padded to {limit} mel frames, got {features.shape[-1]}: prepare the "
                "audio with this checkpoint's own processor."
            )
        states = nn.functional.gelu(encoder.conv1(features))
        states = nn.functional.gelu(encoder.conv2(states)).transpose(1, 2)
    states = states + encoder.embed_positions.weight[: states.shape[1]]
    if mask is not None:
        mask = create_bidirectional_mask(config=encoder.config, inputs_embeds=states, attention_mask=mask)
    outputs = []
    for layer in encoder.layers:
        states = layer(states, mask)
        outputs.append(states)
    states = encoder.layer_norm(states)
    states = torch.stack([*outputs[:-1], states], dim=1) if all_layers else states[:, None]
    return states, lengths


def _encode_waveform(
    tower: Any, samples: torch.Tensor, lengths: torch.Tensor, all_layers: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """WavLM, HuBERT, wav2vec 2.0 and the like: (K, samples), (K,) -> (K, L, T, C), (K,) encoder frames."""
    frames = tower._get_feat_extract_output_lengths(lengths)
    if tower.config.feat_extract_norm == "group":
        # The first convolution is normalised over all of time, padding included: each clip has to run alone.
        outputs = [
            tower(clip[None, :length], output_hidden_states=all_layers)
            for clip, length in zip(samples, lengths.tolist(), strict=True)
        ]
    else:
        mask = length_mask(lengths, samples.shape[1])
        outputs = [tower(samples, attention_mask=mask.long(), output_hidden_states=all_layers)]
    longest, parts = int(frames.max()), []
    for output in outputs:
        layers = [output.last_hidden_state]
        if all_layers:
            layers = [*output.hidden_states[1:-1], output.last_hidden_state]
        states = torch.stack(layers, dim=1)[:, :, :longest]
        parts.append(nn.functional.pad(states, (0, 0, 0, longest - states.shape[2])))
    return torch.cat(parts), frames


def _join_chunks(states: torch.Tensor, lengths: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The real frames of each clip's chunks one after the other: (K, L, T, C), (K,) -> (A, L, T', C), (A,)."""
    clips = [
        torch.cat([chunk[:, :length] for chunk, length in zip(group, sizes, strict=True)], dim=1)
        for group, sizes in zip(states.split(counts), lengths.split(counts), strict=True)
    ]
    lengths = torch.tensor([clip.shape[1] for clip in clips], device=states.device)
    joined = states.new_zeros(len(clips), states.shape[1], int(lengths.max()), states.shape[3])
    for row, clip in zip(joined, clips, strict=True):
        row[:, : clip.shape[1]] = clip
    return joined, lengths
