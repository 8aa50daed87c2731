"""What one GPU shows within five minutes: `python -P -m benchmarks.gpu [--device cpu --quick] [--out FILE]`."""

from benchmarks.gpu.everything import main

if __name__ == "__main__":
    main()
