"""Language models: loading, forward passes, adapters and packing."""
