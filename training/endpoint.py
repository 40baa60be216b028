"""Where an OpenAI-compatible server is: vLLM, llama.cpp, `transformers serve`, ours, a provider."""

import os


def read_endpoint(url: str) -> tuple[str, str, str]:
    """Base URL and model of `http://host:port/v1#model`, and the key, which the environment variable OPENAI_API_KEY holds.

    Raises:
        ValueError: the URL names no model.
    """
    base, _, model = url.partition("#")
    if not model:
        raise ValueError(f"{url}: name the model behind a #, for example http://localhost:8000/v1#my-model.")
    return base, model, os.environ.get("OPENAI_API_KEY", "none")
