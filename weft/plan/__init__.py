"""From a batch to the program that runs it."""
