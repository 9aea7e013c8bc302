"""The results of a run: records, tables, the exported model and its card."""
