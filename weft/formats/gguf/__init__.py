"""GGUF: everything of a model in one file, or in a few that belong together."""
