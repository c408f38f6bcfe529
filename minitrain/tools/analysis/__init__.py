"""Tools that read the logs of runs: plots, diagnoses, comparisons."""
