"""Loads a checkpoint and holds a conversation of two turns, one spoken and one typed.

python -m dual_slm.training.examples.chat
"""

from dual_slm import DualSLMForConditionalGeneration, DualSLMProcessor
from dual_slm.training.commands.common import default_checkpoint
from dual_slm.training.files import DEMO_CLIP


def main(checkpoint: str | None = None, audio=DEMO_CLIP, text: str = "Why do you think so?") -> list[str]:
    """Prints what is heard and both replies, which it returns.

    Args:
        checkpoint: folder or Hub id. Default: the released small one.
        audio: any form that `load_audio` takes.
    """
    checkpoint = checkpoint or default_checkpoint()
    model = DualSLMForConditionalGeneration.from_pretrained(checkpoint)
    processor = DualSLMProcessor.from_pretrained(checkpoint)
    conversation = processor.conversation(model, system="You are a kind listener.", max_new_tokens=32)
    turn = conversation.say(audio=audio)
    print("heard:", turn["heard"], turn["attributes"])
    print("reply:", turn["reply"])
    second = ""
    for chunk in conversation.stream(text=text):  # breaking out of the loop stops the generation
        print(chunk, end="", flush=True)
        second += chunk
    print()
    return [turn["reply"], second]


if __name__ == "__main__":
    main()
