"""One decomposition on many processes, or in parts (chapters 21 and 22)."""
