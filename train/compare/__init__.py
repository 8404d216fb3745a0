"""``python -m train compare``: what each method does, under one budget, with error bars.

plan.py says which runs there are, work.py does them, findings.py, statistics.py and drift.py make numbers of them,
pictures.py and report.py show them.
"""
