"""Launchers: each only starts the worker command, somewhere."""
