"""What keeps a run alive or ends it well: signals, hangs, loss spikes, replicas, restarts."""
