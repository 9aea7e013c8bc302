"""Language models: loading, forward passes, adapters and packing. The loss core is `retort.core.per_token`."""
