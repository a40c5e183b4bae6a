"""FLOPs, throughput and logs."""
