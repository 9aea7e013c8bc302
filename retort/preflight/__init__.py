"""`retort doctor`: checks of models, data and memory before any GPU time is spent."""
