"""What each command does, as its help describes it."""

from __future__ import annotations

RETORT = (
    "On-policy distillation of language models: the student generates completions, the teacher scores every token of "
    "them, and the student learns from the difference."
)
WORDS = "settings: a TOML file, or words such as optimizer.learning_rate=1e-5; later ones win"
TRAIN = (
    "Trains a student. Without arguments it runs the built-in task, in minutes on a laptop. With --student, --teacher "
    "and --data it takes any causal language or image-text models of transformers. `retort settings` lists all "
    "settings."
)
EVAL = "Generates completions of the data's prompts, grades them, and prints avg@k and pass@k with their intervals."
SCORE = (
    "Has a teacher score the data's completions (column `response`) for the needs of a method, and stores the scores "
    "in a cache. `retort train` with the same --cache finds them there, and with cache.only=true needs no teacher."
)
TRUST = (
    "Forces tokens drawn from the teacher into completions of the student, lets the student continue, and measures how "
    "well teacher entropy, student entropy and position predict that the completion ends right. Writes trust.json into "
    "the run's folder, and the report again."
)
DOCTOR = (
    "Checks student, teacher and data as `retort train` would load them (without arguments: the built-in task), lets "
    "the student generate a few completions, and says what it found, why it matters and what to do. The exit code is 2 "
    "if a check is fatal."
)
