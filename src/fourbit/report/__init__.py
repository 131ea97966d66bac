"""The report of a run (``report.html``) and its picture for a README."""

from fourbit.report.comparison import ComparedMethod as ComparedMethod
from fourbit.report.comparison import ComparisonContent as ComparisonContent
from fourbit.report.comparison import write_comparison as write_comparison
from fourbit.report.content import ReportContent as ReportContent
from fourbit.report.page import write_report as write_report
from fourbit.report.summary import plot_comparison as plot_comparison
from fourbit.report.summary import plot_plans as plot_plans
from fourbit.report.summary import plot_summary as plot_summary
