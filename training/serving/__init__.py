"""An OpenAI-compatible server: what a message may bring, encoder and adapters without the LLM, engines, routes."""
