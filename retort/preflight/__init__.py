"""`retort doctor`: what can be found out before any GPU-hour is spent."""
