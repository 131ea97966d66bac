"""The report of a run (``report.html``) and its picture for a README."""

from fourbit.report.content import ReportContent as ReportContent
from fourbit.report.page import write_report as write_report
from fourbit.report.summary import plot_plans as plot_plans
from fourbit.report.summary import plot_summary as plot_summary
