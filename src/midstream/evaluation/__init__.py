"""Measuring adapters: tasks, metrics with intervals, baselines, reports."""
