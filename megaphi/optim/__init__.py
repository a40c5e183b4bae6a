"""Optimizer, schedule and gradient clipping."""
