"""Measuring an engine on the machine at hand: its speed, what an adapter's call costs, and the bounds of both."""
