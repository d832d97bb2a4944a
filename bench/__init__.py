"""The benchmark of frskd_fast: `python bench/run.py` measures, `python bench/report.py` turns results into tables."""
