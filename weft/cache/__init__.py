"""Key/value memory."""
