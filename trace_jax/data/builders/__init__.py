"""TFDS builders: release folders in M-BEIR's layout -> ArrayRecord, read at random by Grain."""
