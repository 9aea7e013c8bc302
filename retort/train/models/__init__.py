"""The models of a run: where each lies, how it is loaded, in which precision and attention."""
