"""SUPERB's tasks, which s3prl runs on a frozen upstream, and their table row."""
