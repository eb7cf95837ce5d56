"""Training data: files and data sets as typed records, split by prompt, rendered to token ids."""
