"""All that talks to ``torch.distributed``: reductions, shards of ``DTensor`` s, what ranks agree on."""
