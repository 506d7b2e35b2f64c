"""Pictures and pages: what was measured, for people, and the same numbers as Parquet.

page.py  figure.py  table.py   what every page is made of; page.css and page.js draw it
log.py   run.py  run_parts.py  a run: `run_page(read_run(directory))`
horizon.py  strip.py           how far back gradients go: `horizon_page(report)`
comparison.py                  estimators side by side: `comparison_page(comparison)`
terminal.py                    the same in a few lines of text
series.py                      numbers on their way into a picture
"""

from tbptt.report.comparison import comparison_page
from tbptt.report.figure import Choice, Figure, escaped
from tbptt.report.horizon import horizon_page
from tbptt.report.log import RunLog, read_run
from tbptt.report.page import Page, Section
from tbptt.report.run import run_page
from tbptt.report.strip import Strip
from tbptt.report.table import Table
from tbptt.report.terminal import brief, sparkline

__all__ = [
    "Choice",
    "Figure",
    "Page",
    "RunLog",
    "Section",
    "Strip",
    "Table",
    "brief",
    "comparison_page",
    "escaped",
    "horizon_page",
    "read_run",
    "run_page",
    "sparkline",
]
