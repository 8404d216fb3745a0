"""`python -m tools.gpu_check`: what can be found out about the kernels on a GPU only, in one run of five minutes.

    machine    what it is, and how fast it can go at all
    library    the one that was built beforehand if it has code for this GPU, else it is built
    truth      the loss on random cases against float64, the project's tests, memcheck and racecheck: side by side
    timing     every kernel and the whole step
    counters   what the hardware counted (ncu)
    baselines  the same in plain PyTorch, and compiled

Read `__main__.py` (what runs, in what order), `run.py` (how a section is isolated), then the module of a section.
"""
