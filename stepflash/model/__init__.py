"""The architecture and nothing else."""
