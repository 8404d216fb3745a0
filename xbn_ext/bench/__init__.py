"""`python -m xbn_ext.bench`: this library against PyTorch as one would write it, and pytorch-metric-learning."""
