"""The hunt: replays a subject in every variant, and makes one report of what was measured.

The only room that knows both columns: it runs the replays and hands their traces to the analysis.
"""

from nanhunt.hunting.plan import Plan, hunt, investigate

__all__ = ["Plan", "hunt", "investigate"]
