"""The device policy, threads, and training in several processes."""
