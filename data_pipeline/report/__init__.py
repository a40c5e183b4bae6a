"""The corpus report: how diverse a corpus is, how much of it repeats, what it covers."""
