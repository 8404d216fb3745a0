"""`python -m tools.wheel_check dist/*.whl`: what the wheel claims, one file for every torch and Python, no compiler.

Makes an environment of the oldest supported torch on the oldest Python found here and one of the newest torch on the
newest Python, installs the same wheel in both, and runs `inside.py` there: every op and some training steps against the
reference, and the CUDA kernels, on a GPU if there is one. Builds another wheel with the oldest torch, whose headers are
not those of later ones, and runs that. Then abi3audit looks at the library. Downloads gigabytes: torch for Linux comes
with CUDA's libraries.

Exit status: 0 if everything asked for was checked and passed, 1 if something failed or was unavailable, 2 for wrong
arguments. What could not be checked is said, never passed over.

Read `__main__.py` (what runs), `pairs.py` (one Python and one torch), `built.py` (the same from the sources),
`inside.py` (what is checked there).
"""
