"""Scores of generated programs: suites, isolation, judging, pass@k, reports."""
