"""`python -m tools.gpu_check`: what can be found out about the kernels on a GPU only.

    part A   build, correctness against float64, sanitizers
    part B   timings against PyTorch and against the machine's ceilings
    part C   hardware counters (ncu)

Read `__main__.py` (what runs), `run.py` (how a section is isolated), then the module of a section.
"""
