"""A seeded short-video world: logs for quickstarts, and the true expected feedback to measure alignment against.

Simulated metrics are never results on real data.
"""

from .serving import Visitors, simulate_visits, user_totals
from .world import ShortVideoWorld

__all__ = ["ShortVideoWorld", "Visitors", "simulate_visits", "user_totals"]
