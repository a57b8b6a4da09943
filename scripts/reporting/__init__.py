"""The parts of report.py: runs, tables, comparisons, figures, page."""
