"""A method applied to a batch: its terms per step, the score pass, and one whole batch for other trainers."""
