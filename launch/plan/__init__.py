"""What a run will take before it is queued: memory, time, money, and what would not work (`vlm plan`)."""
