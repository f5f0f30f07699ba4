"""Runs programs: lanes, executor, sampler, and the worker process around them."""
