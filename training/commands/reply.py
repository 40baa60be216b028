"""`dual-slm reply`."""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..labels import best_labels
from .common import add_checkpoint_arguments, add_command, check_files, load, show_heard

if TYPE_CHECKING:
    from ...conversation_dual_slm import DualSLMConversation


def register(subparsers) -> None:
    parser = add_command(subparsers, "reply", reply)
    parser.add_argument("files", nargs="*", metavar="FILE", help="audio files or URLs; without any, a chat starts")
    add_checkpoint_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a turn")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--hotwords", nargs="+", default=[], metavar="WORD", help="names and terms to expect")
    parser.add_argument("--say", help="text added to every spoken turn, such as a question about it")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest reply")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")


def reply(args: argparse.Namespace) -> None:
    """Print the words and the voice attributes heard in each file, and the reply. Several files are turns of one
    conversation."""
    check_files(args.files)
    model, processor = load(args)
    if args.hotwords:
        processor.set_hotwords(model, args.hotwords)
    generation = {"max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:
        generation |= {"do_sample": True, "temperature": args.temperature}
    transcribe = None
    if processor.linguistic_adapter_type == "none" and model.config.audio_config.model_type == "whisper":
        transcribe = _whisper(str(model.config.audio_model_id))
    if args.say is None and processor.attribute_questions:  # this checkpoint answers questions and does not chat
        args.say = processor.question(next(iter(processor.attribute_questions)))
    conversation = processor.conversation(model, system=args.system, transcribe=transcribe, **generation)
    for file in args.files:
        _turn(conversation, args, file, args.say)
    if not args.files:
        _chat(conversation, args)


def _chat(conversation: "DualSLMConversation", args: argparse.Namespace) -> None:
    """Reads file names and sentences from the terminal until an empty line."""
    print("Type the name of an audio file, or a sentence. An empty line ends the conversation.", file=sys.stderr)
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            return
        if not line:
            return
        audio = line if Path(line).is_file() or "://" in line else None
        try:
            _turn(conversation, args, audio, args.say if audio else line)
        except (ValueError, OSError) as error:
            print(f"dual-slm: {error}", file=sys.stderr)


def _whisper(audio_model_id: str) -> Callable[[Any], str]:
    """Whisper's own decoder, loaded at the first clip, for checkpoints that take the words as text."""
    from ...audio_dual_slm import load_audio
    from ...backbones_dual_slm import resolve_backbone
    from ..backbones import transcriber

    decoder = functools.cache(lambda: transcriber(resolve_backbone(audio_model_id)))
    return lambda audio: decoder()(load_audio(audio))


def _turn(conversation: "DualSLMConversation", args: argparse.Namespace, audio: str | None, text: str | None) -> None:
    """Says one turn and prints the answer, as JSON or for people."""
    start = time.perf_counter()
    if args.json:
        turn = conversation.say(audio=audio, text=text)
        result = {"file": audio, "heard": turn["heard"], "attributes": best_labels(turn["attributes"]) or None}
        result |= {"probabilities": turn["attributes"], "reply": turn["reply"]}
        print(json.dumps(result | {"seconds": round(time.perf_counter() - start, 3)}))
        return
    chunks = conversation.stream(audio=audio, text=text)
    first = next(chunks, "")
    turn = conversation.current_turn or {}
    if audio is not None:
        show_heard(audio, turn["heard"], turn["attributes"])
    print(f"reply       {first}", end="", flush=True)
    for chunk in chunks:
        print(chunk, end="", flush=True)
    print(f"\nseconds     {time.perf_counter() - start:.2f}", flush=True)
