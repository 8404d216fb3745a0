"""`python -m benchmarks`: this library against PyTorch as one would write it, and pytorch-metric-learning."""
