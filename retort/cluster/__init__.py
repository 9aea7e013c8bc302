"""Runs in several processes that Ray starts, on this machine or on several. Ray itself is imported inside functions."""
