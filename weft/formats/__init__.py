"""Where a model comes from, whatever its files: one source of tensors, configuration, tokenizer and end tokens."""
