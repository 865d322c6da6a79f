"""Where the pipeline is plugged in: one file per compiler that can take it."""
