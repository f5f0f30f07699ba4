"""Requests, and which of their tokens go into the next batch. No torch."""
