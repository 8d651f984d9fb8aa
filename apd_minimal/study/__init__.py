"""Looking at a finished decomposition: measures, signs of failure, pictures."""
