"""Published methods, one file each: the function `x` in `x.py` makes the method `x`. Values only.

The example of each method follows these lines; logits are logarithms of probabilities, so that it can be checked by
hand:

>>> import retort
>>> from retort.functional import token_losses
>>> from torch import tensor
"""
