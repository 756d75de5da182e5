"""What everything rests on: errors, configs, artifact folders, sparse codes, statistics, progress."""
