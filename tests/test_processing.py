"""The processor: counts of placeholders, the LLM's own template, and refusals that help."""

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoProcessor

from conftest import make_model, prepare, tone


def turn(audio, **keys):
    return [{"role": "user", "content": [{"type": "audio", "audio": audio, **keys}]}]


@pytest.mark.slow
@pytest.mark.parametrize("audio", [np.zeros(1, np.float32), np.zeros(16_000, np.float32), tone(0.02), tone(90.0)])
def test_odd_lengths_and_silence_get_a_finite_answer(tiny, audio):
    model, processor = tiny
    inputs = prepare(processor, turn(audio))
    with torch.inference_mode():
        assert model(**inputs).logits.isfinite().all()
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert output.shape[1] <= inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 320, 321, 16_000, 479_999, 480_000, 480_001, 1_440_000])
def test_the_processor_counts_what_the_model_makes(paper, samples):
    model, processor = paper
    clip = np.random.default_rng(0).standard_normal(samples).astype(np.float32) * 0.1
    inputs = prepare(processor, turn(clip))
    names = ("input_features", "input_features_mask", "audio_num_chunks")
    with torch.inference_mode():
        features = model.get_audio_features(**{name: inputs[name] for name in names})
    found = int((inputs["input_ids"] == processor.linguistic_token_id).sum())
    assert found == int(features.linguistic_lengths) == processor.num_linguistic_tokens(samples)
    # 10 Hz: one embedding for every started 0.1 s (a chunk border may add one encoder frame).
    assert abs(found - -(-samples // 1_600)) <= 1
    assert int(inputs["audio_num_chunks"]) == -(-samples // 480_000)
    assert int((inputs["input_ids"] == processor.paralinguistic_token_id).sum()) == processor.num_paralinguistic_tokens


def test_features_of_a_clip_do_not_depend_on_the_batch(tiny):
    _, processor = tiny
    clips = [tone(0.4, 1), tone(2.0, 2)]
    together = processor.extract_features(clips)
    for row, clip in enumerate(clips):
        alone = processor.extract_features([clip])
        frames = int(alone["input_features_mask"].sum())
        assert frames == int(together["input_features_mask"][row].sum()) == -(-len(clip) // 160)
        assert torch.equal(together["input_features"][row, :, :frames], alone["input_features"][0, :, :frames])


def test_real_length_features_are_the_padded_ones_cut(tiny_backbones):
    clip = tone(1.3)
    mel = {}
    for padding in ("max_length", "real"):
        _, processor = make_model(tiny_backbones, encoder_padding=padding)
        mel[padding] = processor.extract_features([clip])["input_features"][0]
    assert mel["max_length"].shape[1] == 3000
    torch.testing.assert_close(mel["real"], mel["max_length"][:, : mel["real"].shape[1]])


def test_text_only_is_the_tokenizers_own_template(tiny):
    _, processor = tiny
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "the fox"},
        {"role": "user", "content": [{"type": "text", "text": "over"}]},
    ]
    flat = [m if isinstance(m["content"], str) else m | {"content": m["content"][0]["text"]} for m in messages]
    expected = processor.tokenizer.apply_chat_template(flat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prepare(processor, messages)["input_ids"][0].tolist() == expected
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == processor.tokenizer.apply_chat_template(flat, add_generation_prompt=True, tokenize=False)


def test_round_trip_through_a_folder(tiny, tmp_path):
    _, processor = tiny
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    conversation = turn(tone(0.7))
    ours, theirs = prepare(processor, conversation), prepare(loaded, conversation)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert len(loaded.tokenizer) == len(processor.tokenizer)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"audio": tone(0.1), "speed": 2}, r"unknown keys \['speed'\]"),
        (
            {"audio": tone(0.1), "linguistic": "text"},
            "linguistic is 'text'; it must be one of speech, transcript, none",
        ),
        ({"audio": tone(0.1), "linguistic": "transcript"}, "needs the text 'transcript'"),
        ({"audio": tone(0.1), "paralinguistic": "caption", "caption": " "}, "needs the text 'caption'"),
        ({"paralinguistic": "speech"}, "needs one of 'audio', 'path' and 'url', got 0"),
        ({"audio": tone(0.1), "path": "a.wav"}, "got 2 of them"),
        ({"paralinguistic": "caption", "caption": "<|linguistic|>", "linguistic": "none"}, "reserved for audio"),
    ],
)
def test_bad_turns_are_refused(tiny, part, message):
    _, processor = tiny
    with pytest.raises(ValueError, match=message):
        prepare(processor, [{"role": "user", "content": [{"type": "audio", **part}]}])


def test_placeholders_in_text_are_refused(tiny):
    """Otherwise a user could write audio positions into the prompt."""
    _, processor = tiny
    for text in ("<|audio|>", "say <|paralinguistic|>", "<|linguistic|>"):
        with pytest.raises(ValueError, match="reserved for audio"):
            prepare(processor, [{"role": "user", "content": text}])


def test_marks_and_clips_must_match_and_unknown_keywords_raise(tiny):
    _, processor = tiny
    with pytest.raises(ValueError, match=r"has 1 <\|audio\|> marks but there are 2 clips"):
        processor(text="<|audio|>", audio=[tone(0.1), tone(0.1)])
    with pytest.raises(TypeError, match="audios"):
        processor(text="<|audio|>", audios=[tone(0.1)])
    with pytest.raises(ValueError, match="type 'image'"):
        prepare(processor, [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}])


def test_a_rate_beside_a_chat_is_that_of_its_arrays(tiny):
    """As in transformers' own processors; an 8 kHz array that is taken for 16 kHz is an octave too high."""
    _, processor = tiny
    low = tone(1.0)[::2]
    chat = [{"role": "user", "content": [{"type": "audio", "audio": low}]}]
    wanted = prepare(processor, [{"role": "user", "content": [{"type": "audio", "audio": (low, 8_000)}]}])
    for options in ({"sampling_rate": 8_000}, {"processor_kwargs": {"sampling_rate": 8_000}}):
        found = prepare(processor, chat, **options)
        assert torch.equal(found["input_features"], wanted["input_features"])
    with pytest.raises(ValueError, match="is not cut"):
        prepare(processor, chat, truncation=True, max_length=10)


ARROW = {  # as `datasets` fills parts that lack a field of another part
    "text": None,
    "url": None,
    "caption": None,
    "transcript": None,
    "sampling_rate": None,
    "paralinguistic": None,
    "linguistic": None,
}


@pytest.mark.parametrize(
    "part",
    [
        {"audio": tone(1.0), **ARROW},
        {"audio": {"bytes": None, "path": None, "array": tone(1.0), "sampling_rate": None}, **ARROW},
        {"audio": (16_000, tone(1.0)), "path": None},
        {"audio": tone(1.0), "sampling_rate": 16_000, "path": {"bytes": None, "path": None}},
    ],
)
def test_parts_that_arrow_filled_with_none(tiny, part):
    _, processor = tiny
    wanted = prepare(processor, turn(tone(1.0)))
    chat = [{"role": "user", "content": [{"type": "audio", **part}]}]
    found = prepare(processor, chat)
    assert torch.equal(found["input_features"], wanted["input_features"])
    assert torch.equal(found["input_ids"], wanted["input_ids"])
    chat[0]["content"].append(
        {"type": "text", "text": "why", "audio": {"bytes": None, "path": None}, **ARROW | {"text": "why"}}
    )
    assert "why" in processor.apply_chat_template(chat)


def test_bare_clips_of_datasets_and_a_microphone_that_recorded_nothing(tiny, tmp_path):
    _, processor = tiny
    soundfile.write(tmp_path / "a.wav", tone(1.0), 16_000, subtype="FLOAT")
    wanted = processor(text="<|audio|>", audio=tone(1.0))["input_features"]
    encoded = (tmp_path / "a.wav").read_bytes()
    for clip in ({"bytes": encoded, "path": None}, {"bytes": None, "path": str(tmp_path / "a.wav")}, encoded):
        assert torch.equal(processor(text="<|audio|>", audio=[clip])["input_features"], wanted)
    low = {"array": tone(1.0)[::2], "sampling_rate": None}
    assert processor(text="<|audio|>", audio=[low], sampling_rate=8_000)["input_features"].shape == wanted.shape
    for nothing in (None, {"type": "audio", "audio": None}):
        with pytest.raises(ValueError, match="got 0 of them: None is what a microphone gives that recorded nothing"):
            processor(text="<|audio|>", audio=[nothing])


def test_long_clips_need_no_second_copy_of_their_features(paper):
    """Each chunk's features are the chunk's own, whatever the clip they are in."""
    _, processor = paper
    clip = tone(70.0)
    whole = processor.extract_features([clip])["input_features"]
    for row, start in enumerate(range(0, len(clip), 480_000)):
        alone = processor.extract_features([clip[start : start + 480_000]])["input_features"][0]
        assert torch.equal(whole[row, :, : alone.shape[1]], alone)
