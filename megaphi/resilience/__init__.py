"""What keeps a run alive or ends it well: signals, hangs, loss spikes, replicas, restarts.

Imports `formats`, `metrics` and `parallel`. Begin with `signals.py` and `watchdog.py`;
`docs/reliability.md` says what each is for and how it was tested.
"""
