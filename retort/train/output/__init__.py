"""What a run leaves behind: records, results, the exported model and its card."""
