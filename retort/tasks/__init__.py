"""Built-in tasks: small, complete, checkable, and ready without a download."""
