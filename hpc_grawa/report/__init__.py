"""What runs came to: read their folders, tabulate them, draw them."""

from .figure import draw
from .runs import RunRecord, group, read_run
from .table import Row, Table, markdown, rows, write_csv

__all__ = ["Row", "RunRecord", "Table", "draw", "group", "markdown", "read_run", "rows", "write_csv"]
