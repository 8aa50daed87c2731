"""All benchmarks by topic: `python -P -m benchmarks`."""

from benchmarks.catalogue import listing, topics

if __name__ == "__main__":
    print("usage: python -P -m benchmarks.TOPIC.SCRIPT [ARGUMENTS], or --help")
    for topic in topics():
        print(f"\n{topic}\n{listing(topic)}")
