"""What this machine has: `megaphi doctor` and `megaphi preflight`."""
