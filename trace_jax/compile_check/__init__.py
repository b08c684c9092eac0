"""The real TPU compiler, ahead of time and without a TPU: what fits, and what bounds its speed."""
