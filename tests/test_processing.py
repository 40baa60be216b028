"""The processor: any audio there is, counts of placeholders, the LLM's own template, and refusals that help."""

import numpy as np
import pytest
import soundfile
import soxr
import torch

from conftest import tone
from dual_slm.processing_dual_slm import CaptionSlots, load_audio


def prompt(processor, conversation, **options):
    return processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=True, **options
    )


def turn(audio, **keys):
    return [{"role": "user", "content": [{"type": "audio", "audio": audio, **keys}]}]


# ---- audio -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 192_000])
def test_other_rates_are_resampled(rate):
    audio = tone(1.0)
    there = soxr.resample(audio, 16_000, rate)
    back = load_audio(there, rate)
    assert abs(len(back) - 16_000) <= 2
    # The tone lies far below 4 kHz, so it survives the way through any of these rates; the noise above is not compared.
    low = soxr.resample(soxr.resample(audio, 16_000, 6_000), 6_000, 16_000)
    again = soxr.resample(soxr.resample(back, 16_000, 6_000), 6_000, 16_000)
    size = min(len(low), len(again))
    assert np.abs(low[200 : size - 200] - again[200 : size - 200]).max() < 0.02


@pytest.mark.parametrize(
    ("form", "convert"),
    [
        ("int16", lambda a: (a * 32768).astype(np.int16)),
        ("int32", lambda a: (a.astype(np.float64) * 2**31).astype(np.int32)),
        ("uint8", lambda a: np.round(a * 128 + 128).astype(np.uint8)),
        ("float64", lambda a: a.astype(np.float64)),
        ("list", lambda a: a.tolist()),
        ("tensor", torch.from_numpy),
        ("stereo", lambda a: np.stack([a, a], axis=1)),
        ("channels first", lambda a: np.stack([a, a])),
        ("datasets", lambda a: {"array": a, "sampling_rate": 16_000}),
        ("pair", lambda a: (a, 16_000)),
    ],
)
def test_every_form_of_samples_gives_the_same_clip(form, convert):
    audio = tone(0.5)
    np.testing.assert_allclose(load_audio(convert(audio)), audio, atol=0.005 if form == "uint8" else 1e-4)


def test_files_of_every_format(tmp_path):
    audio = tone(0.5)
    for name, options in {"a.wav": {}, "a.flac": {}, "a.ogg": {}, "a.mp3": {}}.items():
        soundfile.write(tmp_path / name, np.stack([audio, audio], 1), 16_000, **options)
        loaded = load_audio(tmp_path / name)
        assert loaded.dtype == np.float32
        assert abs(len(loaded) - len(audio)) < 2_000
        assert 0.5 < np.sqrt((loaded**2).mean()) / np.sqrt((audio**2).mean()) < 1.5


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(0, np.float32), "no samples"),
        (np.array([0.1, np.nan, np.inf], np.float32), "2 of 3 samples are NaN or infinite"),
        (np.array([0.0, 20000.0], np.float32), "peak at 20000"),
        (np.zeros((3, 4, 5), np.float32), "not one clip"),
        (np.zeros((20, 30), np.float32), "neither mono nor"),
        (np.array(["a", "b"]), "are not audio"),
        ((np.zeros(10, np.float32), 10), "10 Hz is out of reason"),
        ({"samples": [0.0]}, "'array' and 'sampling_rate'"),
    ],
)
def test_bad_samples_are_refused_with_their_value(audio, message):
    with pytest.raises(ValueError, match=message):
        load_audio(audio)


def test_files_that_are_not_audio(tmp_path):
    (tmp_path / "notes.wav").write_text("these are notes")
    with pytest.raises(ValueError, match=r"notes\.wav is not audio that libsndfile reads.*ffmpeg"):
        load_audio(str(tmp_path / "notes.wav"))
    with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
        load_audio(str(tmp_path / "missing.wav"))
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    with pytest.raises(ValueError, match=r"empty\.wav: there are no samples"):
        load_audio(str(tmp_path / "empty.wav"))


@pytest.mark.parametrize("audio", [np.zeros(1, np.float32), np.zeros(16_000, np.float32), tone(0.02), tone(90.0)])
def test_odd_lengths_and_silence_get_a_finite_answer(tiny, audio):
    model, processor = tiny
    inputs = prompt(processor, turn(audio))
    with torch.inference_mode():
        assert model(**inputs).logits.isfinite().all()
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert output.shape[1] <= inputs["input_ids"].shape[1] + 2


# ---- counts and chunks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 320, 321, 16_000, 479_999, 480_000, 480_001, 1_440_000])
def test_the_processor_counts_what_the_model_makes(paper, samples):
    model, processor = paper
    clip = np.random.default_rng(0).standard_normal(samples).astype(np.float32) * 0.1
    inputs = prompt(processor, turn(clip))
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
    from conftest import make_model

    clip = tone(1.3)
    mel = {}
    for padding in ("max_length", "real"):
        _, processor = make_model(tiny_backbones, encoder_padding=padding)
        mel[padding] = processor.extract_features([clip])["input_features"][0]
    assert mel["max_length"].shape[1] == 3000
    torch.testing.assert_close(mel["real"], mel["max_length"][:, : mel["real"].shape[1]])


# ---- text ------------------------------------------------------------------------------------------------------------


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
    assert prompt(processor, messages)["input_ids"][0].tolist() == expected
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == processor.tokenizer.apply_chat_template(flat, add_generation_prompt=True, tokenize=False)


def test_round_trip_through_a_folder(tiny, tmp_path):
    from transformers import AutoProcessor

    _, processor = tiny
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    conversation = turn(tone(0.7))
    ours, theirs = prompt(processor, conversation), prompt(loaded, conversation)
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
        prompt(processor, [{"role": "user", "content": [{"type": "audio", **part}]}])


def test_placeholders_in_text_are_refused(tiny):
    """Otherwise a user could write audio positions into the prompt."""
    _, processor = tiny
    for text in ("<|audio|>", "say <|paralinguistic|>", "<|linguistic|>"):
        with pytest.raises(ValueError, match="reserved for audio"):
            prompt(processor, [{"role": "user", "content": text}])


def test_marks_and_clips_must_match_and_unknown_keywords_raise(tiny):
    _, processor = tiny
    with pytest.raises(ValueError, match=r"has 1 <\|audio\|> marks but there are 2 clips"):
        processor(text="<|audio|>", audio=[tone(0.1), tone(0.1)])
    with pytest.raises(TypeError, match="audios"):
        processor(text="<|audio|>", audios=[tone(0.1)])
    with pytest.raises(ValueError, match="type 'image'"):
        prompt(processor, [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}])


# ---- captions --------------------------------------------------------------------------------------------------------


def test_captions_as_text_and_as_slots_are_the_same_tokens(warm):
    """The embeddings that the adapter is taught are those of the caption written out: text and speech are twins."""
    _, processor = warm
    slots = processor.caption_slots
    caption = processor.caption({"gender": "male", "emotion": "happy"})
    spelled = [slots.token_ids[i] for i in slots.targets({"gender": "male", "emotion": "happy"})]
    text = processor.decode([t for t in spelled if processor.decode([t]) != " "])
    assert text.replace(" ", "") == caption.replace(" ", "")


def test_reading_slots_inverts_spelling_them(warm):
    _, processor = warm
    slots = processor.caption_slots
    for gender in ("female", "male"):
        for emotion in ("neutral", "happy", "sad"):
            target = torch.tensor(slots.targets({"gender": gender, "emotion": emotion}))
            logits = 20.0 * torch.nn.functional.one_hot(target, len(slots.token_ids))
            read = slots.read(logits)
            assert max(read["gender"], key=read["gender"].get) == gender
            assert max(read["emotion"], key=read["emotion"].get) == emotion
            assert sum(read["emotion"].values()) == pytest.approx(1.0, abs=1e-5)
    unknown = slots.targets({"gender": None, "emotion": "sad"})
    assert unknown[slots.fields["gender"]] == [-100] * len(slots.spelling["gender"]["male"])


def test_labels_must_fit_the_template(warm):
    _, processor = warm
    with pytest.raises(ValueError, match="the template has the fields"):
        CaptionSlots(processor.tokenizer, "({gender})", {"age": ["old"]})


def test_a_rate_beside_a_chat_is_that_of_its_arrays(tiny):
    """As in transformers' own processors; an 8 kHz array that is taken for 16 kHz is an octave too high."""
    _, processor = tiny
    low = tone(1.0)[::2]
    chat = [{"role": "user", "content": [{"type": "audio", "audio": low}]}]
    wanted = prompt(processor, [{"role": "user", "content": [{"type": "audio", "audio": (low, 8_000)}]}])
    for options in ({"sampling_rate": 8_000}, {"processor_kwargs": {"sampling_rate": 8_000}}):
        found = prompt(processor, chat, **options)
        assert torch.equal(found["input_features"], wanted["input_features"])
    with pytest.raises(ValueError, match="is not cut"):
        prompt(processor, chat, truncation=True, max_length=10)


def test_bytes_and_open_files_are_read_like_the_file(tmp_path):
    """What a web server is sent."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(0.5), 16_000)
    wanted = load_audio(str(path))
    with open(path, "rb") as file:
        for given in (path.read_bytes(), file):
            np.testing.assert_array_equal(load_audio(given), wanted)
    with pytest.raises(ValueError, match="is not audio that libsndfile reads"):
        load_audio(b"no audio at all")
