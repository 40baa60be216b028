"""A conversation with a dual-adapter model that keeps the LLM's KV cache from turn to turn."""

from collections.abc import Callable, Iterator
from threading import Event, Thread

import torch
from transformers import DynamicCache, StoppingCriteria, TextIteratorStreamer

from .templates_dual_slm import fit_messages
from .turns_dual_slm import AUDIO_MARK


class StopOnEvent(StoppingCriteria):
    """Ends generation once nobody reads it any more."""

    def __init__(self, left: Event):
        self.left = left

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.left.is_set(), device=input_ids.device)


class DualSLMConversation:
    """A conversation that encodes each clip once and keeps the LLM's KV cache: a turn costs only its own tokens.

    ```python
    conversation = processor.conversation(model)
    turn = conversation.say(audio="hello.wav")
    turn["heard"], turn["attributes"], turn["reply"]
    for piece in conversation.stream(text="And why is that?"):
        print(piece, end="")
    ```

    Args:
        model ([`DualSLMForConditionalGeneration`]), processor ([`DualSLMProcessor`]): of one checkpoint.
        system (`str`, *optional*): system prompt.
        transcribe (callable, *optional*): audio as it was given -> words. A checkpoint without a linguistic adapter calls
            it for turns without a transcript.
        generation: defaults of `generate`, for example `max_new_tokens` and `do_sample`.
    """

    def __init__(
        self, model, processor, system: str | None = None, transcribe: Callable | None = None, **generation
    ) -> None:
        self.model, self.processor, self.transcribe = model, processor, transcribe
        self.messages: list[dict] = [{"role": "system", "content": system}] if system else []
        self.generation = {"max_new_tokens": 128, "do_sample": False} | generation
        self._features: list = []  # DualSLMAudioFeatures of the turns
        self._forget()
        self.current_turn: dict | None = None  # what `stream` has heard, before the reply is complete

    def _forget(self) -> None:
        """Empties the KV cache, so that the next turn reads the whole conversation again."""
        self._cache = DynamicCache(config=self.model.config.get_text_config())
        self._cached: list[int] = []  # tokens whose keys and values the cache holds

    def say(self, audio=None, text: str | None = None, **generation) -> dict:
        """One turn of the user, spoken, typed or both.

        Args:
            audio: any audio of `load_audio`; an array at another rate than the model's comes as (samples, rate).
            text: typed text, behind the audio.
            generation: options of `generate` that replace the conversation's own.

        Returns:
            `heard`, `attributes` and `reply`.
        """
        turn = self._hear(audio, text)
        return self._answer(turn, generation)

    def stream(self, audio=None, text: str | None = None, **generation) -> Iterator[str]:
        """Like `say`, but yields the reply piece by piece. Breaking out of the loop stops generation.

        `current_turn` holds what was heard from the first piece on, and the whole turn afterwards.
        """
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []
        left = Event()
        criteria = [*((self.generation | generation).get("stopping_criteria") or []), StopOnEvent(left)]
        turn = self._hear(audio, text)

        def run() -> None:
            try:
                self._answer(turn, generation | {"streamer": streamer, "stopping_criteria": criteria})
            except BaseException as error:  # handed to the reader of the stream
                failure.append(error)
                streamer.end()

        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # two threads must not write into one cache
            left.set()
            thread.join()
        if failure:
            raise failure[0]

    def _hear(self, audio, text: str | None) -> dict:
        """Encodes the turn's clip and appends its message. Nothing changes if the turn is refused."""
        if audio is None and text is None:
            raise ValueError("a turn needs audio, text or both.")
        content, turn = [], {"heard": None, "attributes": None}
        if audio is not None:
            is_part = isinstance(audio, dict) and audio.get("type") == "audio"
            part = audio if is_part else {"type": "audio", "audio": audio}
            words_as_text = self.processor.linguistic_adapter_type == "none"
            if words_as_text and self.transcribe is not None and not part.get("transcript"):
                given = next(part[key] for key in ("audio", "path", "url") if part.get(key) is not None)
                part = part | {"transcript": self.transcribe(given)}
            inputs = self.processor(text=AUDIO_MARK, audio=[part], add_special_tokens=False)
            features = None
            if "input_features" in inputs:
                names = ("input_features", "input_features_mask", "audio_num_chunks", "audio_branches")
                with torch.no_grad():
                    features = self.model.get_audio_features(**{name: inputs[name] for name in names})
                turn |= self.processor.decode_audio(features)[0]
                if self.processor.attribute_questions:  # the LLM's answer knows the words too
                    turn["attributes"] = self.processor.ask_attributes(self.model, part, features)
            if words_as_text:
                turn["heard"] = part.get("transcript")
            # Later turns render the prompt from the placeholders, not from the samples again.
            content.append(part | {"_rendered": self.processor.decode(inputs["input_ids"][0])})
            self._features.append(features)
        if text is not None:
            content.append({"type": "text", "text": text})
        self.messages.append({"role": "user", "content": content})
        self.current_turn = turn
        return turn

    def _prompt(self) -> torch.Tensor:
        """Token ids of the conversation so far, (1, S), with placeholders."""
        tokenizer, template, flat = self.processor.tokenizer, self.processor.chat_template, []
        for message in fit_messages(self.messages, tokenizer, template):
            content = message["content"]
            if not isinstance(content, str):
                content = "\n".join(p["_rendered"] if p["type"] == "audio" else p["text"] for p in content)
            flat.append({"role": message["role"], "content": content})
        return tokenizer.apply_chat_template(
            flat,
            chat_template=template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"].to(self.model.get_input_embeddings().weight.device)

    def _answer(self, turn: dict, generation: dict) -> dict:
        try:
            turn["reply"] = self._generate(self.generation | generation)
        except BaseException:
            message = self.messages.pop()  # as if the turn had not been
            if any(part["type"] == "audio" for part in message["content"]):
                self._features.pop()
            raise
        self.messages.append({"role": "assistant", "content": turn["reply"]})
        return turn

    def _generate(self, options: dict) -> str:
        model, prompt = self.model, self._prompt()
        parts = [part for part in self._features if part is not None]
        audio = type(parts[0]).concatenate(parts) if parts else None
        _, attention_mask = model.merge_audio(prompt, None, audio)
        # The conversation only grows, so equal placeholders at equal places are the same clip's.
        tokens = prompt[0][attention_mask[0].bool()].tolist()
        limit = model.config.get_text_config().max_position_embeddings
        if len(tokens) + options["max_new_tokens"] > limit:
            raise ValueError(
                f"the conversation is {len(tokens)} tokens long; with {options['max_new_tokens']} new ones it passes the "
                f"LLM's {limit}. Start a new conversation."
            )
        named = ("num_beams", "num_return_sequences")
        several = max(options.get(name) or getattr(model.generation_config, name, None) or 1 for name in named) > 1
        if several:
            self._forget()
        self._crop(tokens)
        try:
            output = model.generate(input_ids=prompt, audio_features=audio, past_key_values=self._cache, **options)
        except BaseException:
            self._forget()  # the layers may hold different numbers of keys
            raise
        reply = output[0, prompt.shape[1] :]
        # The cache holds the prompt and the reply except its last token, which was never fed back.
        self._cached = (tokens + reply.tolist())[: self._cache.get_seq_length()]
        if several:
            self._forget()  # it holds the beams
        return self.processor.decode(reply, skip_special_tokens=True).strip()

    def _crop(self, tokens: list[int]) -> None:
        """Cuts the KV cache to what it shares with the prompt, of which at least the last token is read anew."""
        pairs = enumerate(zip(self._cached, tokens[:-1], strict=False))
        shared = next((n for n, (old, new) in pairs if old != new), min(len(self._cached), len(tokens) - 1))
        try:
            if shared < self._cache.get_seq_length():
                self._cache.crop(shared - self._cache.get_seq_length())
        except (RuntimeError, ValueError):  # sliding windows and recurrent states cannot be cropped
            self._forget()
