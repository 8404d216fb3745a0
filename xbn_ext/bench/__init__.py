"""`python -m xbn_ext.bench`: one training step of the memory against what one would write in PyTorch."""
