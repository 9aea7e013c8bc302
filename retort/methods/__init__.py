"""Published methods, one file each: the function `x` in `x.py` makes the method `x`. Values only."""
