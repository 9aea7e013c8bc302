"""`retort serve`: a model that scores for runs in other processes."""
