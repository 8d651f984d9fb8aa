"""What makes the stored artefacts in data/, one file a study; run them as `python -m experiments.NAME`."""
