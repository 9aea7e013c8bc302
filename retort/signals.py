"""The public door to what a teacher can say about each step; the classes live in `retort.core.signals`."""

from retort.core.signals import Candidates, Dense, Gaussian, Sampled, Spans, TeacherSignal, TopK, entropy

__all__ = ["Candidates", "Dense", "Gaussian", "Sampled", "Spans", "TeacherSignal", "TopK", "entropy"]
