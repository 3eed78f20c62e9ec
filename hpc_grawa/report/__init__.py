"""What runs came to: read their folders, tabulate them, draw them."""

from ..runs.record import RunRecord, group, read_run
from .figure import draw
from .table import Row, Table, markdown, rows, write_csv

__all__ = ["Row", "RunRecord", "Table", "draw", "group", "markdown", "read_run", "rows", "write_csv"]
