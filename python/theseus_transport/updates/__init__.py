"""A task vector or LoRA moved through an alignment, and the fate of every tensor."""
