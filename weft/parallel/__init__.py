"""Ranks and what travels between them: the only user of torch.distributed."""
