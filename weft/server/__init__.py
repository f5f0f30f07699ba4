"""The OpenAI API over HTTP, metrics and a page, on top of the engine."""
