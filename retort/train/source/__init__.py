"""The source of rollouts: which prompts in which order, from the engine or from the cache.

The longest length may change during a run. `Source._cut` cuts rollouts of the replay buffer and of the teacher to it,
by `Rollout.cut` (`retort.core.rollouts`); the engine stops the student's new ones at it.
"""
