"""A method applied to a batch. The words are in the glossary of docs/concepts.md; the axis letters in `retort.core`.

`terms` evaluates a method's terms on a chunk of steps, `scoring` is the score pass before the first optimizer step on a
batch, and `one_batch` does both for a whole batch that another trainer holds. Denominators, and the one place where a
loss becomes a scalar, are in `retort.core.reduce`.
"""
