"""Fits chat messages to what a chat template accepts: Gemma's has no system role, Mistral's wants alternating roles."""

from functools import lru_cache, reduce
from itertools import dropwhile, groupby, takewhile
from typing import Any, NamedTuple

from transformers.utils import logging

logger = logging.get_logger(__name__)


class TemplateRules(NamedTuple):
    """What a chat template accepts, and what it writes before an answer."""

    system: bool = True
    assistant_first: bool = True
    same_role_twice: bool = True
    prompt: str = ""  # a rendered question with the generation prompt
    answer_prefix: str = ""  # white space between the generation prompt and an answer


@lru_cache(maxsize=16)
def _try_template(tokenizer: Any, template: str) -> TemplateRules:
    def render(*roles: str, prompt: bool = False) -> str:
        """A conversation of these roles, or "" if the template refuses or hides a turn."""
        chat = [{"role": role, "content": f"turn{number}"} for number, role in enumerate(roles)]
        options = {"chat_template": template, "add_generation_prompt": prompt, "tokenize": False}
        try:
            text = tokenizer.apply_chat_template(chat, **options)
        except Exception:  # a refusal, whatever the template raises
            return ""
        return text if all(message["content"] in text for message in chat) else ""

    prompt, whole = render("user", prompt=True), render("user", "assistant")
    if not prompt or not whole:  # nothing that could be fitted
        return TemplateRules()
    prefix = whole.removeprefix(prompt).partition("turn1")[0]
    twice = render("user", "user") and render("user", "assistant", "assistant", "user")
    system, assistant_first = render("system", "user"), render("assistant", "user")
    prefix = prefix if prefix.isspace() else ""
    return TemplateRules(bool(system), bool(assistant_first), bool(twice), prompt, prefix)


def fit_messages(messages: list[dict], tokenizer: Any, chat_template: str | None = None) -> list[dict]:
    """The messages as the template (default: the tokenizer's) accepts them; unchanged where it accepts everything.

    A refused system prompt goes in front of the first user turn. Where the user must begin, leading turns of the
    assistant are dropped, with one warning. Where roles must alternate, consecutive turns of one role are joined.
    """
    rules = _try_template(tokenizer, tokenizer.get_chat_template(chat_template))
    system = list(takewhile(lambda message: message["role"] == "system", messages))
    turns = messages[len(system) :]
    if not rules.assistant_first and turns and turns[0]["role"] == "assistant":
        told = "the chat template lets no conversation begin with the assistant: its leading turns are dropped."
        logging.warning_once(logger, told)
        turns = list(dropwhile(lambda message: message["role"] == "assistant", turns))
    if system and not rules.system:
        first = next((n for n, message in enumerate(turns) if message["role"] == "user"), 0)
        asked = reduce(_joined, [*system, *turns[first : first + 1]]) | {"role": "user"}
        system, turns = [], [*turns[:first], asked, *turns[first + 1 :]]
    if not rules.same_role_twice:
        turns = [reduce(_joined, same) for _, same in groupby(turns, lambda message: message["role"])]
    return [*system, *turns]


def _joined(first: dict, second: dict) -> dict:
    one, two = first["content"], second["content"]
    if isinstance(one, str) and isinstance(two, str):
        return {**first, "content": f"{one}\n{two}"}
    parts = [[{"type": "text", "text": c}] if isinstance(c, str) else list(c) for c in (one, two)]
    return {**first, "content": parts[0] + parts[1]}


def encode_answer(answer: str, tokenizer: Any, chat_template: str | None = None) -> list[int]:
    """Token ids of an answer behind the template's generation prompt, without its end."""
    rules = _try_template(tokenizer, tokenizer.get_chat_template(chat_template))
    context = rules.prompt if rules.answer_prefix else ""  # without it SentencePiece would add a space of its own
    texts = (context + rules.answer_prefix + answer, context)
    whole, before = (tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in texts)
    return whole[len(before) :]
