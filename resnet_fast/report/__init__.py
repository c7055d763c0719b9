"""The ledger of measurements and its reports: tables, plots, a page, comparisons and a gate."""

from .command import add_parser
from .ledger import Machine, Row, Run, case_name, here, read_runs, write_run

__all__ = ["Machine", "Row", "Run", "add_parser", "case_name", "here", "read_runs", "write_run"]
