"""How families write what is no plain text: thoughts and calls of tools."""
