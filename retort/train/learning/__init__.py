"""The learner: passes of the student over a batch, the score pass, optimizer steps, learning rates, controllers.

`learner` is the party, `update` cuts a batch into optimizer steps, and `rates` computes the learning rate of each.
"""
