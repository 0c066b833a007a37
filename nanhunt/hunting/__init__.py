"""The hunt: replays a subject in every variant, and makes one report of what was measured.

The only room that knows both columns: it runs the replays and hands their traces to the analysis.
"""

from nanhunt.hunting.plan import Plan, hunt, investigate
from nanhunt.hunting.reproduction import Order

__all__ = ["Order", "Plan", "hunt", "investigate"]
