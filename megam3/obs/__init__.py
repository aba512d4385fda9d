"""What a run says about itself: log lines, progress, metrics, speed and memory."""
