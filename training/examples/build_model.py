"""Joins two backbones by new adapters and takes training steps on one clip.

python -m dual_slm.training.examples.build_model
"""

import torch
from transformers import AutoFeatureExtractor, AutoTokenizer

from dual_slm import DualSLMForConditionalGeneration, DualSLMProcessor
from dual_slm.backbones_dual_slm import resolve_backbone
from dual_slm.training.collator import DualSLMCollator
from dual_slm.training.corpora.row import make_row
from dual_slm.training.files import DEMO_CLIP, DEMO_TRANSCRIPT
from dual_slm.training.tasks import make_sample


def main(
    audio_model_id: str = "whisper-base", text_model_id: str = "smollm2-135m-instruct", steps: int = 3
) -> list[float]:
    """Prints and returns the loss of each step. The ids are of the Hub, folders, or names of `dual-slm backbones`."""
    model = DualSLMForConditionalGeneration.from_backbones(audio_model_id, text_model_id)
    processor = DualSLMProcessor.from_config(
        model.config,
        AutoFeatureExtractor.from_pretrained(resolve_backbone(audio_model_id)),
        AutoTokenizer.from_pretrained(resolve_backbone(text_model_id)),
    )
    transcript = DEMO_TRANSCRIPT.read_text(encoding="utf-8").strip()
    row = make_row(id="demo", corpus="demo", split="train", audio=str(DEMO_CLIP), transcript=transcript)
    batch = DualSLMCollator(processor)([make_sample(row, "asr", {})])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # the adapters alone
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    losses = []
    for step in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
