"""What is read from the logs of runs: plots, diagnoses, comparisons."""
